"""The machine: devices and their mesh, processes, compiled programs, text for people."""
