"""Mending a store: its damaged and missing shards are written again, the others are not touched."""

from __future__ import annotations

from common.cache.schema import SKIPPED
from common.cache.storage import locate
from common.cache.writer import shard_key
from common.errors import UserError
from common.runtime import log, read_ranks
from teacher_dump.config import RepairConfig
from teacher_dump.dump import write_missing
from teacher_dump.job import job_of_store
from teacher_dump.store import locked_store, write_errors
from teacher_dump.verify import examine, report


def run_repair(config: RepairConfig) -> None:
    """Verify, remove what is damaged, and let the dump complete the store. UserError if the metadata are damaged."""
    findings = examine(config.store, config.threads)
    print("\n".join(report(config.store, findings)))
    if findings.sound:
        return
    if any(damage.shard is None for damage in findings.damages):
        raise UserError(
            f"{config.store} cannot be repaired: what is damaged is needed to read any of it; dump it again"
        )
    job = job_of_store(config.store, config.source, same_software=True)
    with locked_store(config.store), write_errors(config.store):
        for shard in findings.bad_shards:
            locate(config.store).remove(f"{SKIPPED}/c/{shard}")
            for field in job.manifest.fields():
                locate(config.store).remove(shard_key(field, shard))
    summary = write_missing(job, config.store, config.source.workers, config.skip_broken, read_ranks())
    log.info(f"{config.store}: wrote {summary.samples} samples again in {summary.duration_s:.0f} s")
