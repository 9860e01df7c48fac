"""Decoding a part of a JPEG gives the pixels of the whole one, to the bit."""

import cv2
import numpy as np
import pytest

pytest.importorskip("nvidia.nvimgcodec", reason="pip install 'flaxcls[fast]'")

from flaxcls.data.decode import Picture, decode
from flaxcls.data.region import decode_region
from flaxcls.errors import DataError


def jpeg(height, width, sampling=cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420, *more):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    picture = cv2.GaussianBlur(noise, (0, 0), 2)
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling, *more]
    return cv2.imencode(".jpg", picture, options)[1].tobytes()


@pytest.mark.parametrize("box", [(0, 0, 61, 83), (0, 0, 8, 8), (13, 7, 30, 41), (60, 82, 1, 1)])
@pytest.mark.parametrize(
    "more",
    [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 2)],
    ids=["baseline", "progressive", "restarts"],
)
@pytest.mark.parametrize("sampling", ["420", "422", "440", "444", "411"])
def test_part_is_that_of_the_whole(box, more, sampling):
    factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{sampling}")
    image = jpeg(61, 83, factor, *more)
    top, left, height, width = box
    part = decode_region(image, box)
    assert part is not None
    np.testing.assert_array_equal(part, decode(image, 3)[top : top + height, left : left + width])


def test_picture_uses_it_only_for_upright_colour(monkeypatch):
    used = []
    monkeypatch.setattr("flaxcls.data.decode.decode_region", lambda *given: used.append(given))
    grey = cv2.imencode(".jpg", np.full((9, 9), 50, np.uint8))[1].tobytes()
    png = cv2.imencode(".png", np.full((9, 9, 3), 50, np.uint8))[1].tobytes()
    for image, channels in ((grey, 3), (png, 3), (jpeg(9, 9), 1)):
        assert Picture(image, channels).part((1, 2, 3, 4)).shape == (3, 4, channels)
    assert not used
    Picture(jpeg(9, 9), 3).part((1, 2, 3, 4))
    assert len(used) == 1


def test_whether_an_image_is_broken_does_not_depend_on_the_part():
    cut = jpeg(200, 200)[:-400]
    assert decode_region(cut, (0, 0, 8, 8)) is None
    with pytest.raises(DataError):
        Picture(cut, 3).part((0, 0, 8, 8))
