"""The package as files."""

from __future__ import annotations

import io
import zipfile

from daskllm.runtime import source


def test_what_is_sent_is_the_package_and_nothing_that_was_compiled() -> None:
    names = zipfile.ZipFile(io.BytesIO(source.zipped())).namelist()
    assert {"daskllm/__init__.py", "daskllm/py.typed", "daskllm/demo/model/config.json"} <= set(names)
    assert [name for name in names if "__pycache__" in name] == []


def test_the_version_is_the_package_s() -> None:
    import daskllm

    assert source.version() == daskllm.__version__
