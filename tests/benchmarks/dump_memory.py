"""Memory of writing shards, of two sizes, into a folder and into a bucket: `python -m tests.benchmarks.dump_memory`.

Each case is a process of its own that writes three shards of records of 5.9 MB as a dump does, with a thread behind
it, from records made one batch at a time. Counted is what its own memory (not mapped files) grows by at its peak.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.s3_server import CannotStart, environment, running_server

BATCH, SHARDS = 1, 3
FOLDER_SHARD_BYTES = (64 * 2**20, 256 * 2**20)
BUCKET_SHARD_BYTES = (48 * 2**20, 96 * 2**20)  # the server of the tests holds half a gigabyte

WRITE = """
import sys, threading, time
from pathlib import Path
from common.cache import plan as planning
from common.cache.plan import store_bytes
from common.cache.schema import CodecInfo
from common.cache.storage import locate
from common.cache.writer import create_store
from teacher_dump.store import shard_rows, write_shards
from tests.benchmarks.cache_stores import make_inputs, make_record

out, shard_bytes, batch, shards = sys.argv[1], *map(int, sys.argv[2:])
planning.SHARD_BYTES, planning.MIN_SHARDS = shard_bytes, shards

def own_memory_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1e3

def batches_of(shard):
    rows = shard_rows(shard, manifest.layout)
    for first in range(0, len(rows), batch):
        records = [make_record(manifest, plan, row) for row in rows[first : first + batch]]
        yield (lambda records=records: records), []

manifest, plan = make_inputs(10_000, CodecInfo("fp16", 1.0), layers=6, queries=300, mean_side_px=640)
samples = shards * manifest.layout.shard_samples
manifest, plan = make_inputs(samples, CodecInfo("fp16", 1.0), layers=6, queries=300, mean_side_px=640)
create_store(out, manifest, plan, {})
locate(out).exists("zarr.json")
make_record(manifest, plan, 0)
before, peak, ended = own_memory_mb(), [0.0], threading.Event()

def watch():
    while not ended.is_set():
        peak[0] = max(peak[0], own_memory_mb())
        time.sleep(0.005)

watcher = threading.Thread(target=watch)
watcher.start()
write_shards(out, manifest, plan, range(manifest.layout.shards), batches_of)
ended.set()
watcher.join()
size = store_bytes(manifest, plan.table)
print(f"{manifest.layout.shards} shards of {size / manifest.layout.shards / 1e6:.0f} MB, batches of {batch} x"
      f" {size / samples / 1e6:.2f} MB: {peak[0] - before:.0f} MB more memory")
"""


def write(out: str, shard_bytes: int, variables: dict[str, str]) -> None:
    print("folder" if "://" not in out else "bucket", end=": ", flush=True)
    command = [sys.executable, "-c", WRITE, out, *map(str, (shard_bytes, BATCH, SHARDS))]
    subprocess.run(command, check=True, env=os.environ | variables)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="detrcache-bench-") as folder:
        for size in FOLDER_SHARD_BYTES:
            write(str(Path(folder) / f"{size}.zarr"), size, {})
    try:
        with running_server() as server:
            for size in BUCKET_SHARD_BYTES:
                write(f"s3://bucket/{size}.zarr", size, environment(f"http://127.0.0.1:{server.port}"))
    except CannotStart as reason:
        print(f"no bucket: {reason}")


if __name__ == "__main__":
    main()
