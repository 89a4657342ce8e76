"""Break the code on purpose, one change at a time, and check that a test fails.

    python -m tests.mutations                # all mutations, ten to thirty minutes on one core
    python -m tests.mutations --list         # print the table and run nothing
    python -m tests.mutations --only queue   # the mutations with this text in their file or description

Each entry of `MUTATIONS` is one plausible mistake: a doubled temperature, a view that is predicted from itself, a missing
reduction over ranks. The program copies the working tree to a temporary folder, replaces the old text by the new text,
and runs the named tests there. The mutation is `killed` if a test fails, and it has `SURVIVED` if all tests pass. The exit
status is 1 if a mutation survived, and 2 if the table is out of date.

The copy has no neighbouring folders, so the tests read only the golden numbers in tests/golden. First, the same tests run
on an unchanged copy. If one of them fails there, the program stops.

The old text must occur exactly once in its file. Change the table together with the code.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LEFT_OUT = {".venv", ".git", "runs", "data", ".pytest_cache", ".ruff_cache"}  # of the root
LIMIT = 600  # seconds for the tests of one mutation

LOSSES, ASSIGNMENTS, QUEUES, OPTIM = "src/losses.py", "src/assignments.py", "src/queues.py", "src/optim.py"
BASE, SWAV, SELA = "src/methods/base.py", "src/methods/swav.py", "src/methods/sela_v2.py"
DEEPCLUSTER = "src/methods/deepcluster_v2.py"
SELF_CLASSIFIER, FIRST_GENERATION = "src/methods/self_classifier.py", "src/methods/self_classifier_v1.py"
METRICS, NEIGHBORS, KMEANS = "src/metrics.py", "src/neighbors.py", "src/evaluation/kmeans.py"

T_LOSSES, T_ASSIGNMENTS, T_QUEUES = "tests/test_losses.py", "tests/test_assignments.py", "tests/test_queues.py"
T_OPTIM, T_METRICS, T_KNN = "tests/test_optim.py", "tests/test_metrics.py", "tests/test_knn.py"
T_OBJECTIVES, T_SWAV = "tests/test_objectives.py", "tests/test_swav.py"
T_SELF_CLASSIFIER, T_FIRST_GENERATION = "tests/test_self_classifier.py", "tests/test_self_classifier_v1.py"
T_MEMORY, T_KMEANS = "tests/test_memory.py", "tests/test_kmeans.py"
RANKS = f"{T_OBJECTIVES}::test_objectives_of_two_ranks_are_those_of_one_process"


class Mutation(NamedTuple):
    """One mistake.

    what: the mistake in words.
    file: path of the file that is changed, from the root of the repository.
    old, new: the text that is replaced, which occurs once in the file, and its replacement.
    tests: the test files, or single tests, of which one must fail.
    ranks: whether the tests start several processes. Such tests are slow and left out otherwise.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    ranks: bool = False


def mistakes(file: str, tests: tuple[str, ...], *changes: tuple[str, str, str], ranks: bool = False) -> list[Mutation]:
    """Return mutations of one file that the same tests must notice."""
    return [Mutation(what, file, old, new, tests, ranks) for what, old, new in changes]


MUTATIONS = [
    # ---- Self-Classifier's loss ----------------------------------------------------------------------------------------
    *mistakes(
        LOSSES,
        (T_LOSSES,),
        ("row temperature doubled", "p_y_given_x = [(z / row_tau)", "p_y_given_x = [(z / (2 * row_tau))"),
        ("column temperature doubled", ".div_(col_tau).exp_()", ".div_(2 * col_tau).exp_()"),
        (
            "temperatures of rows and columns swapped",
            "_PairTerms.apply(row_tau, col_tau,",
            "_PairTerms.apply(col_tau, row_tau,",
        ),
        ("softmax of the prediction over the batch", "[(z / row_tau).softmax(dim=-1)", "[(z / row_tau).softmax(dim=1)"),
        (
            "uniform prior over classes dropped",
            "factor = N / widths[k] / m[k]\n            own",
            "factor = N / m[k]\n            own",
        ),
        (
            "targets not normalised",
            "return p_x_given_y / p_x_given_y.sum(dim=-1, keepdim=True).clamp(min=eps)",
            "return p_x_given_y",
        ),
        ("each view also paired with itself", "own = own + (T * log_q).sum()", "own = own + 0 * (T * log_q).sum()"),
        ("local views paired with one another", "(of_globals * log_locals)", "(of_all * log_locals)"),
        ("pairs of views miscounted", "+ (V - num_global) * num_global", "+ (V - num_global)"),
        (
            "number of global views ignored",
            "_PairTerms.apply(row_tau, col_tau, eps, num_global,",
            "_PairTerms.apply(row_tau, col_tau, eps, 2,",
        ),
        (
            "gradient through the targets stopped",
            "found.append(through_target.add_(through_log,",
            "found.append(through_target.mul_(0).add_(through_log,",
        ),
        ("row temperature missing in the gradient", "alpha=1 / row_tau", "alpha=1"),
        (
            "gradient flows through a clamped sum over the batch",
            "torch.where(m[k] > eps, of_log / m[k], 0)",
            "of_log / m[k]",
        ),
        (
            "gradient flows through a clamped sum of a target",
            "moved = torch.where(px[v].sum(dim=-1, keepdim=True) > eps, moved, 0)",
            "moved = moved",
        ),
        (
            "gradient of the logarithm without its guard",
            "torch.mul(py[v], factor[v], out=through_log[v]).mul_(D).div_(log_q.exp()).mul_(scale)",
            "through_log[v] = D * scale",
        ),
        (
            "classifiers summed, not averaged",
            "eps=eps, num_global=num_global).mean()",
            "eps=eps, num_global=num_global).sum()",
        ),
        (
            "half precision not raised",
            "stacked = [z.float() if z.dtype in (torch.float16, torch.bfloat16) else z for z in stacked]",
            "pass",
        ),
    ),
    *mistakes(
        LOSSES,
        (f"{T_LOSSES}::test_authors_loss_over_ranks",),
        (
            "forward sums not reduced over ranks",
            "shared = sum_over_ranks(torch.stack(sums)).split(widths, dim=-1)\n        m =",
            "shared = torch.stack(sums).split(widths, dim=-1)\n        m =",
        ),
        (
            "backward sums not reduced over ranks",
            "shared = sum_over_ranks(torch.stack(sums)).split(widths, dim=-1)\n\n",
            "shared = torch.stack(sums).split(widths, dim=-1)\n\n",
        ),
        (
            "each rank subtracts its own largest logit",
            "peak = max_over_ranks(torch.cat([z.amax(dim=1) for z in logits], dim=-1))",
            "peak = torch.cat([z.amax(dim=1) for z in logits], dim=-1)",
        ),
        ranks=True,
    ),
    # ---- first generation's loss ---------------------------------------------------------------------------------------
    *mistakes(
        LOSSES,
        (T_FIRST_GENERATION,),
        ("temperature doubled, first generation", "else z) / tau\n", "else z) / (2 * tau)\n"),
        ("each view its own target", "-(target.flip(1) * log_prediction)", "-(target * log_prediction)"),
        ("target detached", "-(target.flip(1) * log_prediction)", "-(target.detach().flip(1) * log_prediction)"),
        ("target of a group normalised over classes", "target = z.softmax(dim=3)", "target = z.softmax(dim=4)"),
        (
            "prediction normalised over the batch",
            "log_prediction = z.log_softmax(dim=-1)",
            "log_prediction = z.log_softmax(dim=3)",
        ),
        ("targets never normalised, first generation", "    if normalize_targets:\n", "    if False:\n"),
    ),
    *mistakes(
        LOSSES,
        (RANKS,),
        (
            "column softmax over this rank only",
            "target = unnormalised / sum_over_ranks(unnormalised.sum(dim=3, keepdim=True))",
            "target = unnormalised / unnormalised.sum(dim=3, keepdim=True)",
        ),
        ranks=True,
    ),
    # ---- losses of SwAV and DeepCluster-v2 -----------------------------------------------------------------------------
    *mistakes(
        LOSSES,
        (T_SWAV,),
        (
            "temperature of SwAV's loss doubled",
            "torch.log_softmax(scores / temperature, dim=1)",
            "torch.log_softmax(scores / (2 * temperature), dim=1)",
        ),
        (
            "SwAV's prediction normalised over the batch",
            "torch.log_softmax(scores / temperature, dim=1)",
            "torch.log_softmax(scores / temperature, dim=0)",
        ),
        (
            "SwAV's loss averaged over prototypes",
            "temperature, dim=1)).sum(dim=1).mean()",
            "temperature, dim=1)).mean()",
        ),
    ),
    *mistakes(
        LOSSES,
        (
            T_SWAV,
            T_OBJECTIVES,
        ),
        (
            "temperature of the cluster loss doubled",
            "(scores / temperature).flatten(0, 1)",
            "(scores / (2 * temperature)).flatten(0, 1)",
        ),
        ("labels repeated in the wrong order", "labels.repeat(V)", "labels.repeat_interleave(V)"),
        ("views summed, not averaged", "/ (V * counted.clamp(min=1))", "/ counted.clamp(min=1)"),
        (
            "images without a cluster counted",
            "counted = sum_over_ranks((labels != IGNORED).sum())",
            "counted = sum_over_ranks((labels == labels).sum())",
        ),
    ),
    *mistakes(
        LOSSES,
        (
            T_SWAV,
            T_LOSSES,
        ),
        (
            "images with a cluster counted on this rank only",
            "counted = sum_over_ranks((labels != IGNORED).sum())",
            "counted = (labels != IGNORED).sum()",
        ),
        ("cluster loss not multiplied by the number of ranks", "return total * world_size() /", "return total /"),
    ),
    # ---- assignments ---------------------------------------------------------------------------------------------------
    *mistakes(
        ASSIGNMENTS,
        (T_ASSIGNMENTS,),
        ("epsilon of Sinkhorn doubled", "logs = scores / epsilon", "logs = scores / (2 * epsilon)"),
        ("one Sinkhorn iteration too many", "for _ in range(iterations - 1):", "for _ in range(iterations):"),
        ("first scaling of the columns left out", "logs -= peak + total.log_()", "logs -= peak"),
        ("codes keep a graph", "@torch.no_grad()\ndef sinkhorn(", "def sinkhorn("),
        (
            "half precision of the scores not raised",
            "scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores\n    with",
            "with",
        ),
    ),
    *mistakes(
        ASSIGNMENTS,
        (f"{T_ASSIGNMENTS}::test_ranks_find_what_one_process_finds[2]",),
        (
            "first column sums of this rank only",
            "total = distributed.sum_over_ranks(_exp(logs - peak).sum(dim=0))",
            "total = _exp(logs - peak).sum(dim=0)",
        ),
        (
            "later column sums of this rank only",
            "codes /= distributed.sum_over_ranks(codes.sum(dim=0))",
            "codes /= codes.sum(dim=0)",
        ),
        ranks=True,
    ),
    *mistakes(
        ASSIGNMENTS,
        (T_ASSIGNMENTS,),
        (
            "sharpness of the transport ignored",
            "logs = self.read(rows).double().mul(self.lam)",
            "logs = self.read(rows).double()",
        ),
        (
            "labels without the scaling of the classes",
            "labels[rows] = read(rows).double().mul(lam)",
            "labels[rows] = read(rows).double().mul(1e9)",
        ),
        ("tolerance of the transport ten times larger", "if change <= tolerance:", "if change <= 10 * tolerance:"),
        ("balance checked in every iteration", "if iteration % 10 == 0:", "if True:"),
        (
            "temperature of the prototypes' probabilities ignored",
            "(products if bias is None else products.add_(bias)).div_(temperature)",
            "(products if bias is None else products.add_(bias))",
        ),
    ),
    *mistakes(
        ASSIGNMENTS,
        (f"{T_ASSIGNMENTS}::test_ranks_find_what_one_process_finds[2]",),
        ("plan's column sums of this rank only", "sums = distributed.sum_over_ranks(sums)\n        if not", "if not"),
        ranks=True,
    ),
    *mistakes(
        ASSIGNMENTS,
        (T_ASSIGNMENTS,),
        ("centroids not brought to unit length", "centroids = F.normalize(means, dim=1)", "centroids = means"),
        (
            "a centroid without rows becomes zero",
            "means = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)",
            "means = sums / counts.clamp(min=1)[:, None]",
        ),
        (
            "rows keep the cluster of the centroids before the last",
            "return _nearest_centroid(embeddings, centroids), centroids",
            "return assignments, centroids",
        ),
    ),
    *mistakes(
        ASSIGNMENTS,
        (f"{T_ASSIGNMENTS}::test_ranks_find_what_one_process_finds[2]",),
        (
            "k-means sums of this rank only",
            "sums, counts = distributed.sum_over_ranks(sums), distributed.sum_over_ranks(counts)",
            "pass",
        ),
        ranks=True,
    ),
    # ---- queues --------------------------------------------------------------------------------------------------------
    *mistakes(
        QUEUES,
        (T_QUEUES,),
        (
            "writing starts one row too late",
            "torch.arange(self.pointer, self.pointer + count,",
            "torch.arange(self.pointer + 1, self.pointer + 1 + count,",
        ),
        (
            "a queue that is filled exactly counts as not full",
            "self.pointer + count >= length",
            "self.pointer + count > length",
        ),
        (
            "pointer one row too far",
            "self.pointer = (self.pointer + count) % length",
            "self.pointer = (self.pointer + count + 1) % length",
        ),
        (
            "a loaded queue does not know that it is full",
            "self.pointer, self.full = int(self._pointer), bool(self._full)",
            "self.pointer = int(self._pointer)",
        ),
        (
            "the own image is its neighbour",
            "return torch.where(self.indices[best] == indices, second, best)",
            "return best",
        ),
        (
            "always the second best neighbour",
            "return torch.where(self.indices[best] == indices, second, best)",
            "return second",
        ),
        (
            "own image recognised by its row, not its index",
            "return torch.where(self.indices[best] == indices,",
            "return torch.where(best == indices,",
        ),
        (
            "rows counted from the start of their chunk",
            "rows = torch.cat([rows, at + first], dim=1)",
            "rows = torch.cat([rows, at], dim=1)",
        ),
        ("old labels stay where none was given", "self.labels.index_fill_(0, rows, -1)", "pass"),
    ),
    *mistakes(
        QUEUES,
        (RANKS,),
        (
            "only this rank's embeddings pushed",
            "        embeddings = gather_no_grad(embeddings)\n        length",
            "        length",
        ),
        ranks=True,
    ),
    *mistakes(
        QUEUES,
        (
            T_QUEUES,
            T_SWAV,
        ),
        (
            "images of a new bank count as written",
            "self.written.new_zeros(num_images)",
            "self.written.new_ones(num_images)",
        ),
    ),
    *mistakes(
        QUEUES,
        (T_QUEUES,),
        (
            "a new bank has clusters",
            "self.clusters = self.clusters.new_full((num_heads,",
            "self.clusters = 0 * self.clusters.new_full((num_heads,",
        ),
    ),
    *mistakes(
        QUEUES,
        (RANKS,),
        (
            "bank's embeddings of the ranks joined along the banks",
            "together = gather_no_grad(embeddings.transpose(0, 1)).transpose(0, 1)",
            "together = gather_no_grad(embeddings)[: len(embeddings)]",
        ),
        ranks=True,
    ),
    # ---- optimisation --------------------------------------------------------------------------------------------------
    *mistakes(
        OPTIM,
        (T_OPTIM,),
        (
            "LARS without decay in the denominator",
            "adapted = trust * norm / (grad_norm + decay * norm + eps)",
            "adapted = trust * norm / (grad_norm + eps)",
        ),
        (
            "LARS without weight decay",
            "torch._foreach_add(grads, params, alpha=decay)",
            "torch._foreach_add(grads, params, alpha=0)",
        ),
        ("LARS without the trust coefficient", "adapted = trust * norm /", "adapted = norm /"),
        (
            "LARS with one norm for all tensors",
            "norm = torch.stack(torch._foreach_norm(params))",
            "norm = torch.stack(torch._foreach_norm(params)).norm().expand(len(params))",
        ),
        ("zero tensors never move", "adapted, (grad_norm > 0).to(norm.dtype))", "adapted, torch.zeros_like(norm))"),
        (
            "tensors without a gradient decay all the same",
            "torch.where((norm > 0) & (grad_norm > 0), adapted, (grad_norm > 0).to(norm.dtype))",
            "torch.where(norm > 0, adapted, (grad_norm > 0).to(norm.dtype))",
        ),
        (
            "momentum dampened",
            "torch._foreach_add_(buffers, updates)",
            'torch._foreach_add_(buffers, updates, alpha=1 - group["momentum"])',
        ),
        ("momentum kept but not used", "            updates = buffers\n", ""),
        (
            "vectors of normalisation layers decay",
            '(name.endswith(".bias") or parameter.dim() == 1)',
            'name.endswith(".bias")',
        ),
        (
            "backbone's decay for every part",
            'backbone_decay is not None and name.startswith("backbone.")',
            "backbone_decay is not None",
        ),
        (
            "momentum not passed to LARS",
            "return LARS(groups, lr=lr, momentum=momentum,",
            "return LARS(groups, lr=lr, momentum=0.0,",
        ),
        ("small gradients scaled up by clipping", "list(factors.clamp(max=1.0).unbind())", "list(factors.unbind())"),
        ("freezing by any common beginning", 'f"{name}.".startswith(f"{beginning}.")', "name.startswith(beginning)"),
        (
            "warm-up starts at zero",
            "return warmup_start + (base - warmup_start) * step / max(warmup - 1, 1)",
            "return base * step / max(warmup - 1, 1)",
        ),
        ("warm-up one step too long", "* step / max(warmup - 1, 1)", "* step / max(warmup, 1)"),
        ("cosine counts the warm-up", "(step - warmup) / decay", "step / (warmup + decay)"),
        ("cosine does not end at the final rate", "return final + 0.5 * (base - final) *", "return 0.5 * base *"),
    ),
    # ---- what methods share --------------------------------------------------------------------------------------------
    *mistakes(
        BASE,
        (
            T_OBJECTIVES,
            T_SELF_CLASSIFIER,
        ),
        (
            "batch statistics of each view alone",
            "if i == len(views) or views[i].shape[-1] != views[first].shape[-1]:",
            "if True:",
        ),
        (
            "head's batch statistics of each size alone",
            "return list(self.project(torch.cat(features)).chunk(len(views)))",
            "return list(torch.cat([self.project(part) for part in features]).chunk(len(views)))",
        ),
    ),
    *mistakes(
        BASE,
        (
            T_OBJECTIVES,
            T_MEMORY,
        ),
        ("idle views keep a graph", "            with torch.no_grad():\n", "            with torch.enable_grad():\n"),
    ),
    *mistakes(
        BASE,
        (
            T_OBJECTIVES,
            T_SWAV,
        ),
        (
            "scores of the views mixed up",
            "[head(stacked).unflatten(0, (len(embeddings), -1))",
            "[head(stacked).unflatten(0, (-1, len(embeddings))).transpose(0, 1)",
        ),
    ),
    *mistakes(
        BASE,
        (
            T_OBJECTIVES,
            T_SELF_CLASSIFIER,
        ),
        ("occupancy of the view that is replaced", "z = views[min(1, len(views) - 1)].float()", "z = views[0].float()"),
        ("occupancy without temperature", "(z / self.temperature).softmax(dim=1)", "z.softmax(dim=1)"),
        ("classifiers of different size compared", "if size == self.classes[0]]", "if size]"),
        ("unused classes counted as used", "(share > 0).sum()", "(share >= 0).sum()"),
        (
            "chosen is the classifier with the highest loss",
            '"classifier": min(comparable',
            '"classifier": max(comparable',
        ),
        (
            "entropy of the wrong sign",
            "= -torch.special.xlogy(prediction, prediction)",
            "= torch.special.xlogy(prediction, prediction)",
        ),
        ("collapse recognised after one epoch", "if len(recent) < 5:", "if len(recent) < 1:"),
    ),
    *mistakes(
        BASE,
        (T_SWAV,),
        (
            "prototypes frozen for one step more",
            "if step < self.freeze_prototypes:",
            "if step <= self.freeze_prototypes:",
        ),
        ("prototypes not brought back to unit length", "                head.normalize_()\n", "                pass\n"),
    ),
    # ---- Self-Classifier -----------------------------------------------------------------------------------------------
    *mistakes(
        SELF_CLASSIFIER,
        (
            T_OBJECTIVES,
            T_SELF_CLASSIFIER,
        ),
        (
            "method swaps its temperatures",
            "row_tau=self.config.row_tau,\n            col_tau=self.config.col_tau,",
            "row_tau=self.config.col_tau,\n            col_tau=self.config.row_tau,",
        ),
        ("method takes all views for global", "num_global=self.num_global", "num_global=len(embeddings)"),
        ("method forgets the number of global views", "num_global=self.num_global", "num_global=2"),
        ("method ignores eps", "eps=self.config.eps", "eps=1e-12"),
        (
            "push precedes the look-up",
            "            if self.queue.full:\n",
            "            self.queue.push(first, indices)\n            if self.queue.full:\n",
        ),
        (
            "view 1 replaced by its neighbour",
            "embeddings = [self.queue.embeddings[rows].to(first.dtype), *embeddings[1:]]",
            "embeddings = [embeddings[0], self.queue.embeddings[rows].to(first.dtype), *embeddings[2:]]",
        ),
        (
            "the neighbour is pushed, not the view",
            "self.queue.push(first, indices)",
            "self.queue.push(embeddings[0].detach(), indices)",
        ),
        ("neighbours named by their rows", "neighbors = self.queue.indices[rows]", "neighbors = rows"),
        (
            "column temperature for the probabilities",
            "self.classes, self.temperature = config.classes, config.row_tau",
            "self.classes, self.temperature = config.classes, config.col_tau",
        ),
    ),
    *mistakes(
        SELF_CLASSIFIER,
        (T_MEMORY,),
        (
            "replaced view loses gradient through batch normalisation",
            "return int(replaced and not self._couples_images)",
            "return int(replaced)",
        ),
    ),
    # ---- Self-Classifier, first generation -----------------------------------------------------------------------------
    *mistakes(
        FIRST_GENERATION,
        (T_FIRST_GENERATION,),
        (
            "method doubles its temperature, first generation",
            "logits, self.config.tau,",
            "logits, 2 * self.config.tau,",
        ),
        ("method ignores its groups", "group=self.config.softmax_group", "group=0"),
        (
            "batch statistics over both views",
            "return [self.embed(view) for view in views]",
            "return list(self.embed(torch.cat(views)).chunk(len(views)))",
        ),
        (
            "agreement of the first classifier",
            'averages["agreement"][summary["classifier"]]',
            'averages["agreement"][0]',
        ),
        (
            "price of a collapse upside down",
            "self.config.num_classes / self.group",
            "self.group / self.config.num_classes",
        ),
    ),
    # ---- SwAV ----------------------------------------------------------------------------------------------------------
    *mistakes(
        SWAV,
        (
            T_OBJECTIVES,
            T_SWAV,
        ),
        (
            "SwAV doubles its temperature",
            "[swapped_prediction(z, codes, self.temperature) for z in others]",
            "[swapped_prediction(z, codes, 2 * self.temperature) for z in others]",
        ),
        (
            "SwAV ignores its temperature",
            "[swapped_prediction(z, codes, self.temperature) for z in others]",
            "[swapped_prediction(z, codes, 0.1) for z in others]",
        ),
        (
            "a view predicts its own codes too",
            "others = [z for v, z in enumerate(scores) if v != assigned]",
            "others = [z for v, z in enumerate(scores)]",
        ),
        ("views swapped: a view predicts only its own codes", "if v != assigned]", "if v == assigned]"),
        ("codes always of view 0", "scores[assigned].detach())", "scores[0].detach())"),
        ("SwAV's prototypes learn from the first step", "self.freeze_prototypes = config.freeze_prototypes", "pass"),
        (
            "epsilon is the temperature",
            "return sinkhorn(scores, self.config.epsilon,",
            "return sinkhorn(scores, self.temperature,",
        ),
        (
            "number of Sinkhorn iterations ignored",
            "self.config.epsilon, self.config.sinkhorn_iterations)",
            "self.config.epsilon, 3)",
        ),
        ("codes of the queue instead of the batch", "[-len(embeddings) :]", "[: len(embeddings)]"),
        ("one queue for all assigned views", "past = queue.embeddings", "past = self.queues[0].embeddings"),
        (
            "a loaded method does not know that its queues have started",
            "        self._started = bool(self.queue_started)\n",
            "        pass\n",
        ),
        (
            "push precedes the look at the queue",
            "            if queue.full:\n",
            "            queue.push(embeddings)\n            if queue.full:\n",
        ),
    ),
    *mistakes(
        SWAV,
        (RANKS,),
        (
            "every rank brings the whole queue",
            "past = queue.embeddings.tensor_split(distributed.world_size())[distributed.rank()]",
            "past = queue.embeddings",
        ),
        ranks=True,
    ),
    # ---- DeepCluster-v2 and SeLa-v2 ------------------------------------------------------------------------------------
    *mistakes(
        DEEPCLUSTER,
        (
            T_OBJECTIVES,
            T_SWAV,
        ),
        (
            "DeepCluster-v2 doubles its temperature",
            "assigned_cross_entropy(z, c, self.temperature)",
            "assigned_cross_entropy(z, c, 2 * self.temperature)",
        ),
        (
            "DeepCluster-v2 ignores its temperature",
            "assigned_cross_entropy(z, c, self.temperature)",
            "assigned_cross_entropy(z, c, 0.1)",
        ),
        (
            "heads predict one another's clusters",
            "clusters = self.bank.clusters[:, indices]",
            "clusters = self.bank.clusters.flip(0)[:, indices]",
        ),
        (
            "clusters by place in the batch, not by image",
            "clusters = self.bank.clusters[:, indices]",
            "clusters = self.bank.clusters[:, : len(indices)]",
        ),
        (
            "every bank holds view 0",
            "torch.stack([embeddings[v].detach() for v in",
            "torch.stack([embeddings[0].detach() for v in",
        ),
        ("heads summed, not averaged", "return Step(terms.mean(),", "return Step(terms.sum(),"),
        ("centroids are trained", "self.classifiers.requires_grad_(False)", "self.classifiers.requires_grad_(True)"),
        (
            "prototypes are the initial centroids",
            "self.heads[head].weight.copy_(centroids)",
            "self.heads[head].weight.copy_(start)",
        ),
        (
            "number of k-means iterations ignored",
            "spherical_kmeans(mine, start, self.config.kmeans_iterations)",
            "spherical_kmeans(mine, start, 10)",
        ),
    ),
    *mistakes(
        SELA,
        (
            T_OBJECTIVES,
            T_SWAV,
        ),
        (
            "transport at twice the temperature",
            "self.temperature,\n                lam",
            "2 * self.temperature,\n                lam",
        ),
        ("transport of a tolerance of its own", "tolerance=self.config.tolerance", "tolerance=0.1"),
        ("transport of any length", "max_iterations=self.config.max_iterations", "max_iterations=1000"),
        ("transport of a sharpness of its own", "lam=self.config.lam", "lam=25.0"),
        ("prototypes learn from the first step", "self.freeze_prototypes = config.freeze_prototypes", "pass"),
        (
            "SeLa-v2's prototypes do not learn",
            "self.freeze_prototypes = config.freeze_prototypes",
            "self.classifiers.requires_grad_(False)",
        ),
    ),
    # ---- clustering scores ---------------------------------------------------------------------------------------------
    *mistakes(
        METRICS,
        (T_METRICS,),
        (
            "a cluster left over takes its smallest class",
            "partner = per_cluster.argmax(axis=1)",
            "partner = per_cluster.argmin(axis=1)",
        ),
        ("every cluster takes its majority class", "    partner[matched] = their_class\n", ""),
        (
            "worst matching instead of the best",
            "linear_sum_assignment(per_cluster, maximize=True)",
            "linear_sum_assignment(per_cluster)",
        ),
        (
            "superclass accuracy counts fine classes",
            "right = superclass[cells.row] == superclass[match_clusters(counts)][cells.col]",
            "right = cells.row == match_clusters(counts)[cells.col]",
        ),
        (
            "mutual information normalised by the larger entropy",
            "_mutual_information(counts) / ((_entropy(class_sizes) + _entropy(cluster_sizes)) / 2)",
            "_mutual_information(counts) / max(_entropy(class_sizes), _entropy(cluster_sizes))",
        ),
        (
            "mutual information not corrected for chance",
            "expected = expected_mutual_information(class_sizes, cluster_sizes)",
            "expected = 0.0",
        ),
        ("Rand index with ordered pairs", "int((sizes * (sizes - 1) // 2).sum())", "int((sizes * sizes).sum())"),
        ("expected mutual information cut off too early", "NEGLIGIBLE = 1e-20", "NEGLIGIBLE = 1e-4"),
    ),
    *mistakes(
        METRICS,
        (T_KNN,),
        (
            "first and fifth place swapped",
            "{k: (first / len(queries), five / len(queries))",
            "{k: (five / len(queries), first / len(queries))",
        ),
    ),
    # ---- nearest neighbours --------------------------------------------------------------------------------------------
    *mistakes(
        NEIGHBORS,
        (T_KNN,),
        (
            "rows counted from the start of their chunk of the bank",
            "torch.cat([rows, where + start], dim=1)",
            "torch.cat([rows, where], dim=1)",
        ),
        (
            "of equally near rows of two chunks the later wins",
            "best, rows = torch.cat([best, found], dim=1), torch.cat([rows, where + start], dim=1)",
            "best, rows = torch.cat([found, best], dim=1), torch.cat([where + start, rows], dim=1)",
        ),
        ("ties at the cut left to chance", "    if cut.any():\n", "    if False:\n"),
        (
            "columns of equal values not sorted",
            "columns, order = columns.sort(dim=1)\n",
            "columns, order = columns.sort(dim=1, descending=True)\n",
        ),
        ("the value after the k-th not looked at", "values.topk(min(k + 1,", "values.topk(min(k,"),
        (
            "equals that faiss left out forgotten",
            "unclear |= best[:, k - 1] == best[:, k]",
            "unclear |= best[:, k - 1] < best[:, k]",
        ),
        ("equals in the order of faiss", "tied = (best[:, 1:] == best[:, :-1])", "tied = (best[:, 1:] > best[:, :-1])"),
        ("infinite products forgotten", "unclear = (rows < 0)", "unclear = (rows < -1)"),
        ("distances in place of products", "metric=faiss.METRIC_INNER_PRODUCT", "metric=faiss.METRIC_L2"),
        (
            "rows counted from the start of a converted part",
            "torch.from_numpy(where) + start",
            "torch.from_numpy(where)",
        ),
        ("converted parts not sorted together", "        if start > 0:\n", "        if best.shape[1] > k:\n"),
        ("faiss rounds float64", "or each.dtype == torch.float64", ""),
        (
            "products in half precision",
            "torch.promote_types(torch.promote_types(bank.dtype, queries.dtype), torch.float32)",
            "torch.promote_types(bank.dtype, queries.dtype)",
        ),
        ("temperature of the votes upside down", ".double() / tau).exp()", ".double() * tau).exp()"),
        ("every vote weighs alike", ".double() / tau).exp()", ".double() * 0).exp()"),
        (
            "near neighbours vote again for every k",
            "votes.scatter_add_(1, labels[:, counted:k], weights[:, counted:k])",
            "votes.scatter_add_(1, labels[:, :k], weights[:, :k])",
        ),
        (
            "of equal votes the larger class wins",
            "smaller = torch.arange(len(classes), device=device) < target",
            "smaller = torch.arange(len(classes), device=device) > target",
        ),
        ("the first six classes count as five", "(place < 5)", "(place <= 5)"),
    ),
    # ---- k-means of features -------------------------------------------------------------------------------------------
    *mistakes(
        KMEANS,
        (T_KMEANS,),
        ("tolerance of all features, not of their mean", "spread / features.numel()", "spread / len(features)"),
        ("moves not squared", "shift.double().square().sum() <= limit", "shift.double().sum() <= limit"),
        ("no early stop", "left_before - left < least_gain * left", "left_before - left < 0 * left"),
        ("starts ignore the early stop", "tolerance=tolerance, least_gain=least_gain", "tolerance=tolerance"),
        ("rows not centred for faiss", "(self.features[part] - self.middle).numpy()", "self.features[part].numpy()"),
        ("no bounds after faiss", "(self.owner != before).float().mean() <= SETTLED", "False"),
        ("bounds too early", "(self.owner != before).float().mean() <= SETTLED", "True"),
        ("moves ignored by the upper bounds", "self.upper += shift[self.owner]", "self.upper += 0 * shift[self.owner]"),
        ("a given row keeps its bounds", "self.lower[:, rows] = -math.inf", "self.lower[:, rows] *= 1"),
    ),
]


class OutOfDate(Exception):
    """The table no longer fits the code or the tests."""


@contextmanager
def copied_tree():
    """Copy the working tree to a temporary folder without neighbours."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=lambda at, _: LEFT_OUT if Path(at) == ROOT else {"__pycache__"})
        yield copy


def mutated(text: str, mutation: Mutation) -> str:
    """Return the text of a file with the mutation.

    Raises:
        OutOfDate: if the old text does not occur exactly once.
    """
    found = text.count(mutation.old)
    if found != 1:
        raise OutOfDate(f"{mutation.what}: the old text occurs {found} times in {mutation.file}, expected once")
    return text.replace(mutation.old, mutation.new)


def run_tests(copy: Path, tests: Sequence[str], ranks: bool) -> tuple[str, str]:
    """Run tests in the copy.

    Returns:
        "passed", "failed" or "stopped" (at the time limit), and the first failed test or the end of the output.
    """
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "--tb=no",
        "-rfE",
    ]
    words += [] if ranks else ["-m", "not slow and not ranks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*words, *tests], cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return "stopped", f"after {LIMIT} s"
    if done.returncode == 0:
        return "passed", ""
    if done.returncode == 1:
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        return "failed", failed[1].removeprefix("tests/") if failed else "?"
    raise OutOfDate(f"pytest ended with status {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")


def check_unchanged(chosen: Sequence[Mutation]) -> None:
    """Run the tests of these mutations on unchanged code.

    Raises:
        OutOfDate: if a test fails.
    """
    with copied_tree() as copy:
        for ranks in (False, True):
            tests = sorted({test for mutation in chosen if mutation.ranks == ranks for test in mutation.tests})
            if tests:
                outcome, details = run_tests(copy, tests, ranks)
                if outcome != "passed":
                    raise OutOfDate(f"a test {outcome} without any mutation: {details}")


def try_mutation(mutation: Mutation) -> tuple[bool, str]:
    """Apply a mutation to a copy and run its tests there. Return whether a test failed, and which."""
    with copied_tree() as copy:
        path = copy / mutation.file
        path.write_text(mutated(path.read_text(), mutation))
        try:
            outcome, details = run_tests(copy, mutation.tests, mutation.ranks)
        except OutOfDate as error:
            raise OutOfDate(f"{mutation.what}: {error}") from None
    return outcome != "passed", details


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="run the mutations whose file or description has TEXT"
    )
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    options = parser.parse_args()
    wanted = options.only.lower()
    chosen = [mutation for mutation in MUTATIONS if wanted in f"{mutation.file} {mutation.what}".lower()]
    width = max((len(f"{mutation.file}  {mutation.what}") for mutation in chosen), default=0)
    try:
        for mutation in chosen:  # the whole table first: a text that is gone should not be found after minutes
            mutated((ROOT / mutation.file).read_text(), mutation)
        if options.list:
            for mutation in chosen:
                print(f"{f'{mutation.file}  {mutation.what}':{width}}  {' '.join(mutation.tests)}")
            print(f"{len(chosen)} mutations")
            return 0
        check_unchanged(chosen)
        survived = []
        for mutation in chosen:
            start = time.monotonic()
            killed, details = try_mutation(mutation)
            survived += [] if killed else [mutation]
            seconds = f"{time.monotonic() - start:5.1f} s"
            verdict = "killed  " if killed else "SURVIVED"
            print(f"{f'{mutation.file}  {mutation.what}':{width}}  {verdict} {seconds}  {details}", flush=True)
    except OutOfDate as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(chosen)} mutations, {len(chosen) - len(survived)} killed, {len(survived)} survived")
    for mutation in survived:
        print(f"SURVIVED: {mutation.file}: {mutation.what}; tests: {' '.join(mutation.tests)}")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
