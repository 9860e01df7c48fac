"""What `import flaxcls` offers to Python users; each function is what a command does.

Nothing here ends the process: what a command would say before it exits is an exception,
flaxcls.FlaxclsError, and Ctrl-C saves the run and raises flaxcls.Interrupted.

Where a function passes its arguments on, its signature is that of what it calls.
"""
