"""How long the gradient of each loss is and where it points: `python -m tests.benchmarks.loss_gradients`.

Of students of `python -m tests.results` (which must have run) before and after training: norms over all parameters, and
cosines with the gradient of the detection losses, means over batches of 16 of the training scenes. The weights are
those of the results.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from student_train.config import ModelOptions, OptimisationOptions
from student_train.prepare import prepare_data, prepare_student
from student_train.teachers import Lesson
from teacher_dump.config import DataOptions
from tests.benchmarks.fidelity import BATCH, Setting, batches, errors
from tests.results import ARMS, STARTS, TEACHER, Item
from tests.training_cases import losses_of

KINDS = ("detection", "logits", "assignment", "features")


def gradients(item: Item, init: Path | None, count: int) -> dict[str, tuple[float, float]]:
    """Norm of each kind of loss's gradient and its cosine with detection's, for a student that starts from `init`."""
    config = replace(
        item.config, model=ModelOptions("tiny", init=init), optimisation=OptimisationOptions(batch_size=BATCH)
    )
    torch.manual_seed(0)
    data = prepare_data(config.data)
    assert data.reader is not None
    student = prepare_student(config, data).train()
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]

    def of(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]).double()

    setting = Setting("", "", DataOptions(item.out / "scenes"), config.distillation, False, "val2017")
    measured: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for batch, cached, _ in itertools.islice(batches(setting, data.reader, seed=3), count):
        output = student(batch.images, batch.padding_mask)
        losses = losses_of(output, batch.targets, [Lesson(cached)], config.distillation)
        each = {
            kind: of(torch.stack([loss for name, loss in losses.items() if name.split("/")[0] == kind]).sum())
            for kind in KINDS
        }
        for kind, gradient in each.items():
            measured[kind].append((float(gradient.norm()), errors(gradient, each["detection"])[1]))
    data.reader.close()
    return {kind: (mean(norm for norm, _ in found), mean(cos for _, cos in found)) for kind, found in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.loss_gradients", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("build/results"), help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=3, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    inherited, scratch = STARTS[0], STARTS[1]
    plain, everything = (next(arm for arm in ARMS if arm.name == name) for name in ("plain", "all"))
    item = Item(scratch, everything, 0, arguments.results)
    students: list[tuple[str, Path | None]] = [("scratch, at the beginning", None)]
    students += [
        (f"{start.name}, {arm.name}, step {start.steps}", _last(Item(start, arm, 0, arguments.results)))
        for start, arm in ((scratch, plain), (scratch, everything))
    ]
    students += [
        ("inherited, at the beginning", TEACHER),
        (f"inherited, all, step {inherited.steps}", _last(Item(inherited, everything, 0, arguments.results))),
    ]
    print("| student | " + " | ".join(f"{kind}: norm, cosine" for kind in KINDS) + " |")
    print("|---" * (1 + len(KINDS)) + "|")
    for name, init in students:
        found = gradients(item, init, arguments.batches)
        print(f"| {name} | " + " | ".join(f"{norm:.1f}, {cosine:.2f}" for norm, cosine in found.values()) + " |")


def _last(item: Item) -> Path:
    return item.config.output.out / item.name / "last.safetensors"


if __name__ == "__main__":
    main()
