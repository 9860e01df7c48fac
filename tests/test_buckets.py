"""The stand-ins for buckets do what the tests of the others rest on."""

import os

import fsspec
import pytest
import tensorstore
from etils import epath


def test_what_is_written_is_read_and_counted(bucket, bucket_server):
    path, content = f"{bucket}/a/b c.bin", b"0123456789\r"
    filesystem, name = fsspec.core.url_to_fs(path)
    filesystem.pipe_file(name, content)
    assert filesystem.cat_file(name) == content
    assert filesystem.cat_file(name, start=3, end=5) == b"34"
    filesystem.invalidate_cache()
    (found,) = filesystem.find(bucket, detail=True).values()
    assert found["size"] == len(content)
    assert epath.Path(path).read_bytes() == content
    assert [line.split()[0] for line in bucket_server.requests()].count("GET") >= 4
    assert bucket_server.requests() == []


def test_a_store_that_fails_for_a_moment_is_asked_again(bucket, bucket_server):
    filesystem, name = fsspec.core.url_to_fs(f"{bucket}/x")
    filesystem.pipe_file(name, b"x")
    bucket_server.requests()
    bucket_server.faults(fail=2)
    assert filesystem.cat_file(name, start=0, end=1) == b"x"
    assert len(bucket_server.requests()) == 3


def test_an_object_is_made_once(gcs_bucket):
    filesystem, name = fsspec.core.url_to_fs(f"{gcs_bucket}/x")
    filesystem.pipe_file(name, b"1", mode="create")
    with pytest.raises(FileExistsError):
        filesystem.pipe_file(name, b"2", mode="create")
    assert filesystem.cat_file(name) == b"1"


def test_of_two_that_write_the_same_version_one_is_refused(bucket):
    scheme, name = bucket.split("://")
    spec = {"driver": {"gs": "gcs", "s3": "s3"}[scheme], "bucket": name}
    if scheme == "s3":
        spec |= {"endpoint": os.environ["AWS_ENDPOINT_URL"], "aws_region": "us-east-1"}
    store = tensorstore.KvStore.open(spec).result()
    first = store.write("key", b"first").result().generation
    second = store.write("key", b"second", if_equal=first).result().generation
    assert second != first
    store.write("key", b"late", if_equal=first).result()
    found = store.read("key").result()
    assert (found.value, found.stamp.generation) == (b"second", second)
