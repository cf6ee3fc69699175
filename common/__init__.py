"""What both phases build on.

Our package `kernels` bears the name of one on PyPI, which Hugging Face's libraries use. In one folder they overwrite
each other's files; on one path the first hides the other. Where it is the other that would be found, this says so
before anything fails with a message about something else. (For transformers beside ours, see
`teacher_dump.transformers_teacher.import_transformers`.)
"""

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path


def _check_kernels() -> None:
    try:
        other = distribution("kernels")
    except PackageNotFoundError:
        return
    found = find_spec("kernels")
    if found is not None and found.origin and Path(str(other.locate_file("kernels/__init__.py"))) == Path(found.origin):
        raise ImportError(
            f"expected DETRCache's package `kernels`, found PyPI's kernels {other.version} in {found.origin}: run"
            " `pip uninstall kernels` and `pip install --force-reinstall --no-deps detrcache`"
        )


_check_kernels()
