"""Runs a step program on a shard: one short method per instruction kind.

State of a step, by micro-batch m: the residual x[m], its gradient g[m], this worker's partial sums, what arrived
from others, and for every FULL call (leaf, output) until its backward. A sub-layer is the only autograd graph; the
residual stream, layer scale γ and output bias b are done by hand:

    forward    x ← x + γ·c·Σ parts                c = H / running heads under skip_fill "rescale", else 1;
                                                  one of the parts includes b/c
    backward   ∂part = c·γ·g,  ∂b = Σ γ·g,  ∂γ = Σ g·c·Σ parts,  g ← g + Σ ∂x of the parts

Where messages are of a narrower type, whoever sends a part adds what the others get of it, and a value of x or g that
is sent to anybody is rounded by all who go on with it: all compute from the same bits.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scheduler.cost import TALLIED
from scheduler.program import Instruction
from workers.gates import Gates
from workers.pulse import Pulse, Quiet
from workers.shard import Shard
from workers.steps import WISH, Batch, StepPrograms, StepReport, StepState, TimingKey
from workers.trace import UNTRACED, Untraced
from workers.transport import Transport

Update = Callable[[float], None]


class Executor:
    """Runs programs on one worker's shard over a transport.

    `update(grad_norm)` is called at `step` with all gradients in place; None leaves them in place (tests, rehearsals).
    `means[block, part]` are the H × D mean outputs that skip_fill "mean" adds; with `measures_means` a forward pass
    finds those of this worker's heads. A pass without gradient hands its logits to `logits(micro_batch, logits_BC)`.
    With `autocast` the sub-layers and the ends compute in that type. `gates`, where there are any,
    record what FULL heads are worth on steps that are due. A step's tally tells all workers
    what rank 0 has in `wishes`; `pulse` hears of every instruction.
    """

    def __init__(
        self,
        shard: Shard,
        transport: Transport,
        *,
        update: Update | None = None,
        label_smoothing: float = 0.0,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.shard, self.transport, self.update = shard, transport, update
        self.label_smoothing, self.autocast = label_smoothing, autocast
        self.rank = transport.rank
        self.means: dict[tuple[int, str], Tensor] = {}
        self.measures_means = False
        self.logits: Callable[[int, Tensor], None] | None = None
        self.gates: Gates | None = None
        self.wishes = 0
        self.pulse: Pulse = Quiet()
        self._recording: Gates | None = None
        self._trace = UNTRACED
        self._state = StepState(Batch({}, {}), 1)
        self._do = {
            "embed": self._embed,
            "fwd": self._fwd,
            "sum": self._sum,
            "classify": self._classify,
            "bwd": self._bwd,
            "unembed": self._unembed,
            "send": self._send,
            "recv": self._recv,
            "free": self._free,
            "step": self._step,
        }

    def run(
        self,
        programs: StepPrograms,
        batch: Batch,
        *,
        step: int | None = None,
        timed: bool | None = None,
        trace: Untraced = UNTRACED,
    ) -> StepReport:
        """Run one step; afterwards nothing of it is kept but gradients, where there is no `update`.

        `step` counts over the training; without it the gates do not record. `timed` costs nothing on a processor, the
        default there; on CUDA the device is waited for after every instruction, so let it be a few steps of a window.
        `trace` hears when every instruction ends, of the device where the step is timed.
        """
        on_cuda = self.shard.device.type == "cuda"
        timed = not on_cuda if timed is None else timed
        self._recording = self.gates if self.gates is not None and step is not None and self.gates.due(step) else None
        told = (programs.num_tallied, programs.wire, programs.travelling, programs.recompute)
        self._state = StepState(batch, len(programs.running), *told)
        kind_s: dict[str, float] = defaultdict(float)
        timings_us: dict[TimingKey, list[float]] = defaultdict(list)
        begin, cpu = time.perf_counter(), time.process_time()
        self.transport.open(programs.incoming)
        before = time.perf_counter()
        self._trace = trace
        trace.begins(begin, before)
        for index, (instruction, key) in enumerate(zip(programs.own.instructions, programs.timing_keys, strict=True)):
            self.pulse.at(index)
            self._do[instruction.kind](instruction)
            if timed and on_cuda:
                torch.cuda.synchronize(self.shard.device)
            after = time.perf_counter()
            kind_s[instruction.kind] += after - before
            trace.did(instruction, after)
            if timed:
                timings_us[key].append(1e6 * (after - before))
            before = after
        self.transport.close()
        state, self._state = self._state, StepState(Batch({}, {}), 1)
        total = self._tally(state) if state.total is None else state.total
        if self._recording is not None and step is not None:
            self._recording.close(step, len(programs.running))
        squares, loss, correct, *losses = total.tolist()
        return StepReport(
            loss=loss,
            correct=int(correct),
            wishes=round(correct % 1 / WISH),
            grad_norm=squares**0.5,
            wall_s=time.perf_counter() - begin,
            wait_s=kind_s["recv"],
            cpu_s=time.process_time() - cpu,
            kind_s=dict(kind_s),
            sent_bytes=tuple(self.transport.sent_bytes),
            flops=programs.flops,
            losses_MB=np.array(losses).reshape(programs.own.num_micro_batches, -1),
            timings_us=dict(timings_us),
        )

    def _embed(self, i: Instruction) -> None:
        with torch.set_grad_enabled(i.keep), self._casting():
            x_BND = self.shard.embed(self._state.batch.images[i.mb]).to(self.shard.dtype)
        if i.keep:
            self._state.embedded[i.mb] = x_BND
        self._state.x[i.mb] = x_BND.detach()

    def _fwd(self, i: Instruction) -> None:
        state, block = self._state, self.shard.blocks[i.block]
        x_BND = self._rounded("x", i)
        part = y_BND = None
        bias = self._constant_bias(i)
        if i.full:
            leaf = x_BND.detach().requires_grad_(not i.floor)
            y_BND, out = self._run_full(i, leaf, bias, watched=not state.recompute)
            # The graph is made all the same, so that the same kernels run as will again; it ends with this call.
            state.kept[i.block, i.part, i.mb] = (leaf, None if state.recompute and out.requires_grad else out)
            part = out.detach()
        if i.only:
            with torch.no_grad(), self._casting():
                y_BND = block.norms[i.part](x_BND) if y_BND is None else y_BND.detach()
                bias = None if i.full else bias
                weights = block.frozen(i.part, i.only, self.autocast)
                constant = block.run(i.part, y_BND, weights, bias).to(self.shard.dtype)
                if self.measures_means:
                    self._measure_means(i, y_BND)
            part = constant if part is None else part + constant
        assert part is not None
        state.part[i.mb] = part

    def _run_full(self, i: Instruction, leaf: Tensor, bias: Tensor | None, *, watched: bool) -> tuple[Tensor, Tensor]:
        """(norm of the leaf, output) of the FULL heads of a sub-layer: the graph from the leaf to their part."""
        block, gates = self.shard.blocks[i.block], self._recording if watched else None
        watch = None if gates is None else gates.watch(i.block, i.part, i.mb, i.full)
        with torch.enable_grad(), self._casting():
            y_BND = block.norms[i.part](leaf)
            out = block.run(i.part, y_BND, block.trainable(i.part, i.full, self.autocast), bias, watch)
        return y_BND, out.to(self.shard.dtype)

    def _rounded(self, cargo: str, i: Instruction) -> Tensor:
        """x or g as the sub-layer of `i` reads it; what others get over the wire, all go on with."""
        state = self._state
        values = state.x if cargo == "x" else state.g
        if (cargo, i.block, i.part, i.mb) in state.travelling:
            values[i.mb] = values[i.mb].to(state.wire).to(self.shard.dtype)
        return values[i.mb]

    def _constant_bias(self, i: Instruction) -> Tensor | None:
        """What this part adds for the output bias; its gradient is `_bwd`'s."""
        bias = self.shard.blocks[i.block].biases[i.part]
        if bias is None or not i.bias:
            return None
        return bias.detach() * (i.running / self.shard.shape.num_heads) if i.running else bias.detach()

    def _measure_means(self, i: Instruction, y_BND: Tensor) -> None:
        block = self.shard.blocks[i.block]
        for head in i.only:
            out_BND = block.run(i.part, y_BND, block.frozen(i.part, (head,), self.autocast))
            self.means[i.block, i.part][head] = out_BND.mean((0, 1))

    @torch.no_grad()
    def _sum(self, i: Instruction) -> None:
        {"x": self._sum_x, "g": self._sum_g, "grads": self._sum_grads}[i.cargo](i)

    def _sum_x(self, i: Instruction) -> None:
        block = self.shard.blocks[i.block]
        total = self._added("part", i, self._state.part.pop(i.mb))
        if i.running:
            total *= self.shard.shape.num_heads / i.running
        if i.fill:
            total += self.means[i.block, i.part][list(i.fill)].sum(0)
        gamma = block.gammas[i.part]
        x_BND = self._state.x[i.mb]
        if gamma is None:
            self._state.x[i.mb] = total.add_(x_BND)
        elif i.lead:
            self._state.sums[i.block, i.part, i.mb] = total
            self._state.x[i.mb] = torch.addcmul(x_BND, total, gamma)
        else:
            self._state.x[i.mb] = torch.addcmul(x_BND, total, gamma, out=total)

    def _sum_g(self, i: Instruction) -> None:
        self._state.g[i.mb] = self._added("gpart", i, self._state.gpart.pop(i.mb)).add_(self._state.g[i.mb])

    def _sum_grads(self, i: Instruction) -> None:
        self._unflatten(i.units, self._added("gradpart", i, self._flatten(i.units)))

    def _classify(self, i: Instruction) -> None:
        state = self._state
        x_BND = state.x[i.mb].detach().requires_grad_(i.grad and not i.floor)
        with torch.set_grad_enabled(i.grad), self._casting():
            logits_BC = self.shard.classify(x_BND)
        if not i.grad:
            if self.logits is not None:
                self.logits(i.mb, logits_BC)
            return
        labels_B = state.batch.labels[i.mb]
        logits_BC = logits_BC.to(self.shard.dtype)
        if labels_B.is_floating_point():  # mixed images have probabilities, [B, C]
            labels_B = labels_B.to(self.shard.dtype)
        losses_B = F.cross_entropy(logits_BC, labels_B, label_smoothing=self.label_smoothing, reduction="none")
        loss = losses_B.mean() / state.num_running
        torch.autograd.backward(loss)
        state.losses[i.mb] = losses_B.detach()
        if x_BND.grad is not None:
            state.g[i.mb] = x_BND.grad
        state.loss = state.loss + loss.detach()
        answers_B = labels_B.argmax(1) if labels_B.is_floating_point() else labels_B
        state.correct = state.correct + (logits_BC.detach().argmax(1) == answers_B).sum()

    def _bwd(self, i: Instruction) -> None:
        state, block = self._state, self.shard.blocks[i.block]
        gamma, bias = block.gammas[i.part], block.biases[i.part]
        g_BND = self._rounded("g", i)
        branch = g_BND if gamma is None else g_BND * gamma
        if i.lead:
            with torch.no_grad():
                total_BND = state.sums.pop((i.block, i.part, i.mb), None)
                if bias is not None and bias.requires_grad:
                    _accumulate(bias, branch.sum((0, 1)))
                if gamma is not None and gamma.requires_grad:
                    assert total_BND is not None
                    _accumulate(gamma, (g_BND * total_BND).sum((0, 1)))
        if i.running:
            branch = branch * (self.shard.shape.num_heads / i.running)
        leaf, out = state.kept.pop((i.block, i.part, i.mb))
        if out is None:  # without the bias, which has no gradient here
            _, out = self._run_full(i, leaf, None, watched=True)
        if out.requires_grad:  # at the floor nothing does where no matrix of this half trains
            torch.autograd.backward(out, branch)
        if not i.floor:
            assert leaf.grad is not None
            state.gpart[i.mb] = leaf.grad

    def _unembed(self, i: Instruction) -> None:
        torch.autograd.backward(self._state.embedded.pop(i.mb), self._state.g[i.mb])

    def _send(self, i: Instruction) -> None:
        self.transport.send(i.peer, i.key(self.rank), self._cargo(i))

    def _recv(self, i: Instruction) -> None:
        key = i.key(self.rank)
        self.pulse.waits(i.peer)
        tensor = self.transport.recv(i.peer, key)
        self.pulse.waits(None)
        self._trace.turns()
        if i.cargo == "x":
            self._state.x[i.mb] = tensor.to(self.shard.dtype)
        elif i.cargo == "g":
            self._state.g[i.mb] = tensor.to(self.shard.dtype)
        elif i.cargo == "grads":
            self._unflatten(i.units, tensor)
        else:
            self._state.inbox[key] = tensor

    def _free(self, i: Instruction) -> None:
        (self._state.x if i.cargo == "x" else self._state.g).pop(i.mb)

    def _step(self, i: Instruction) -> None:
        state = self._state
        own = self._tally(state)
        tallies = {key[4]: state.inbox.pop(key) for key in list(state.inbox) if key[0] == "tally"} | {self.rank: own}
        total = torch.zeros_like(own)
        for worker in sorted(tallies):  # in rank order: clipping by another last bit would let replicas drift apart
            total += tallies[worker].to(own.device)
        state.total = total
        if self.update is not None:
            self._trace.turns()
            self.update(float(total[0]) ** 0.5)
            self.shard.clear()

    def _cargo(self, i: Instruction) -> Tensor:
        if i.cargo == "tally":
            return self._tally(self._state)
        if i.units:
            return self._flatten(i.units)
        state = self._state
        values = {"x": state.x, "g": state.g, "part": state.part, "gpart": state.gpart}[i.cargo]
        sent = values[i.mb].to(state.wire)
        if i.cargo in ("part", "gpart"):
            values[i.mb] = sent  # what this worker adds as well, should it add
        return sent

    def _added(self, cargo: str, i: Instruction, own: Tensor) -> Tensor:
        """Σ over the ranks in `of`, in rank order, so that every worker that adds gets the same bits.

        The result may be written to: a worker's own part is its alone once the others have their copies.
        """
        inbox, dtype = self._state.inbox, self.shard.dtype

        def part(worker: int) -> Tensor:
            received = Instruction("recv", cargo, i.block, i.part, i.mb, peer=worker, units=i.units)
            return own if worker == self.rank else inbox.pop(received.key(self.rank))

        first, *others = i.of
        if not others:
            return part(first).to(dtype)
        total = part(first).to(dtype) + part(others[0])
        for worker in others[1:]:
            total += part(worker)
        return total

    @torch.no_grad()
    def _tally(self, state: StepState) -> Tensor:
        """[gradient norm² of what this worker speaks for, loss, correct answers, loss of every image].

        Answers are whole: a fraction behind them are the wishes.
        """
        if state.tally is None:
            self.shard.collect()
            params = [p for _, p in self.shard.head_parameters()] + [p for _, p in self.shard.classifier()]
            for unit in filter(self.shard.leads, self.shard.units()):
                params += [p for _, p in self.shard.trained_unit(unit)]
            grads = [p.grad for p in params if p.grad is not None]
            tally = torch.zeros(state.num_tallied, dtype=torch.float64, device=self.shard.device)
            if grads:
                tally[0] = torch.stack(torch._foreach_norm(grads)).double().square().sum()
            tally[1], tally[2] = state.loss, state.correct + WISH * self.wishes
            for m, losses_B in state.losses.items():
                begin = TALLIED + m * len(losses_B)
                tally[begin : begin + len(losses_B)] = losses_B
            state.tally = tally
        return state.tally

    @torch.no_grad()
    def _flatten(self, units: Sequence[int]) -> Tensor:
        params = [p for unit in units for _, p in self.shard.trained_unit(unit)]
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])

    @torch.no_grad()
    def _unflatten(self, units: Sequence[int], flat: Tensor) -> None:
        params = [p for unit in units for _, p in self.shard.trained_unit(unit)]
        for param, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
            param.grad = grad.view_as(param)

    def _casting(self) -> torch.autocast:
        return torch.autocast(self.shard.device.type, dtype=self.autocast, enabled=self.autocast is not None)


def _accumulate(param: torch.nn.Parameter, grad: Tensor) -> None:
    param.grad = grad if param.grad is None else param.grad + grad
