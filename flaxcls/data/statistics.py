"""Mean and standard deviation of pixels, exact up to rounding: every value is counted."""

import cv2
import numpy as np


def channel_histogram(pixels: np.ndarray) -> np.ndarray:
    """How often each channel of uint8 [H, W, C] has each value: int64 [C, 256]."""
    counts = np.zeros((pixels.shape[2], 256), np.int64)
    rows = max(1, 2**24 // pixels.shape[1])  # OpenCV's counts are float32, exact up to 2^24
    for top in range(0, len(pixels), rows):
        part = np.ascontiguousarray(pixels[top : top + rows])
        for channel, total in enumerate(counts):
            counted = cv2.calcHist([part], [channel], None, [256], [0, 256])
            total += counted.ravel().astype(np.int64)
    return counts


def mean_and_std(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """A channel's mean and standard deviation in units of [0, 1], of values counted [C, 256]."""
    values, total = np.arange(256), histogram.sum(axis=1)
    mean = histogram @ values / total
    variance = (histogram * (values - mean[:, None]) ** 2).sum(axis=1) / total
    return (mean / 255).tolist(), (np.sqrt(variance) / 255).tolist()


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 [N, H, W, C], in units of [0, 1]."""
    _, _, width, channels = images.shape
    return mean_and_std(channel_histogram(images.reshape(-1, width, channels)))
