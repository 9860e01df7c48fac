"""Where the examples come from: the only folder that imports TFDS and the image decoders."""
