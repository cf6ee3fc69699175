"""The contrastive loss between matched queries, which the released code of DETRDistill has and the article does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from kernels import to_device

WIDTH = 512
TEMPERATURE = 0.07


class ContrastiveHeads(nn.Module):
    """The projections of student and teacher queries, shared by all decoder layers; trained, and dropped at the end."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.student = _head(student_channels)
        self.teacher = _head(teacher_channels)


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, WIDTH), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
    )


def contrastive_loss(
    student_queries: Tensor, teacher_queries: Tensor, matched: Tensor, index: Tensor, heads: ContrastiveHeads
) -> Tensor:
    """InfoNCE, summed over decoder layers: mean over the N pairs i of a layer, over the whole batch, of
    -log(exp(t_i . s_i / tau) / sum_j exp(t_i . s_j / tau)), tau = .07.

    s and t are the queries through their heads, of unit length. student_queries: (B, L, Q, C) and teacher_queries:
    (B, L, Q_T, C_T), the decoder's output. matched: (B, L, N), on the host, the student's query of each of the
    teacher's, -1 for none. index: (B, L, N), which of the teacher's queries that is. A layer with less than two pairs
    has nothing to contrast and adds 0.
    """
    loss = torch.stack([parameter.sum() for parameter in heads.parameters()]).sum() * 0  # every rank has the same graph
    for layer in range(matched.shape[1]):
        sample, column = (matched[:, layer] >= 0).nonzero(as_tuple=True)
        if len(sample) < 2:
            continue
        pairs = torch.stack((sample, column, matched[sample, layer, column]))
        sample, column, query = to_device(pairs, student_queries.device)
        student = heads.student(student_queries[sample, layer, query].float())
        teacher = heads.teacher(teacher_queries[sample, layer, index[sample, layer, column]].float())
        similarity = normalize(teacher.float(), dim=-1) @ normalize(student.float(), dim=-1).T
        loss = loss + cross_entropy(similarity / TEMPERATURE, torch.arange(len(sample), device=similarity.device))
    return loss
