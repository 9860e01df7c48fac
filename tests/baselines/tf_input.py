"""The input pipeline of Flax's ImageNet example, stage by stage, on a TFRECORD file.

Random crop while decoding, bicubic resampling, flip, normalisation in float32, batch; see
examples/imagenet/input_pipeline.py in google/flax.
"""


def batches(records, batch_size, size=224):
    """Endless batches of float32 [batch_size, size, size, 3] and labels."""
    import tensorflow as tf

    mean = tf.constant([0.485 * 255, 0.456 * 255, 0.406 * 255])
    std = tf.constant([0.229 * 255, 0.224 * 255, 0.225 * 255])
    features = {
        "image": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
    }

    def crop(data, window):
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        return tf.image.resize(image, [size, size], method="bicubic")

    def centre(data, shape):
        side = tf.cast(tf.minimum(shape[0], shape[1]), tf.float32) * (size / (size + 32))
        side = tf.cast(side, tf.int32)
        top, left = (shape[0] - side + 1) // 2, (shape[1] - side + 1) // 2
        return crop(data, tf.stack([top, left, side, side]))

    def example(record):
        parsed = tf.io.parse_single_example(record, features)
        data = parsed["image"]
        shape = tf.image.extract_jpeg_shape(data)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            bounding_boxes=tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4]),
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], extent[:2]], axis=0)
        whole = tf.reduce_all(tf.equal(extent[:2], shape[:2]))
        image = tf.cond(whole, lambda: centre(data, shape), lambda: crop(data, window))
        image = tf.image.random_flip_left_right(tf.reshape(image, [size, size, 3]))
        return (image - mean) / std, parsed["label"]

    data = tf.data.TFRecordDataset([records]).repeat().shuffle(16 * batch_size, seed=0)
    data = data.map(example, num_parallel_calls=tf.data.AUTOTUNE)
    data = data.batch(batch_size, drop_remainder=True).prefetch(10)
    options = tf.data.Options()
    options.threading.max_intra_op_parallelism = 1
    yield from data.with_options(options).as_numpy_iterator()
