"""Which packages a machine without network is given; pip itself is not called."""

from __future__ import annotations

from tests.gpu import wheels


def test_what_is_present_is_left_out() -> None:
    """setup.cfg's requirements without PyTorch's own and with pytest; names compared as packaging does; a local build
    and an editable install in the machine's list do no harm."""
    required = {wheels.name_of(line) for line in wheels.requirements()}
    assert {"zarr", "numba", "google-crc32c", "pytest"} <= required
    assert not required & wheels.TORCH
    frozen = (
        "Numba==0.61.0\ntorch==2.11.0+cu130\n-e git+https://example.org/x#egg=x\ngoogle_crc32c==1.6.0\nx @ file:///x\n"
    )
    present = wheels.versions(frozen)
    assert present == {"numba": "0.61.0", "torch": "2.11.0+cu130", "google-crc32c": "1.6.0"}
    needed = {"numba": "0.61.0", "zarr": "3.1.6", "google-crc32c": "1.6.0", "torch": "2.11.0"}
    assert wheels.lacking(needed, present) == ["zarr==3.1.6"]
