"""What there is to know about a trained network besides its accuracy."""
