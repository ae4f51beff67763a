import sys
import contextlib, torch, copy
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
import torch.nn.functional as F
import planner
from tests.ranks import Ranks


class Block(nn.Module):
    def __init__(s, d=32, p=0.1):
        super().__init__()
        s.a = nn.Linear(d, 4 * d)
        s.b = nn.Linear(4 * d, d)
        s.n = nn.LayerNorm(d)
        s.p = nn.Dropout(p)

    def forward(s, x):
        return x + s.p(s.b(F.gelu(s.a(s.n(x)))))


class Branchy(nn.Module):
    def __init__(s, d=32, n=4, p=0.1):
        super().__init__()
        s.blocks = nn.ModuleList(Block(d, p) for _ in range(n))
        s.h = nn.Linear(d, 4)

    def forward(s, x):
        for i, b in enumerate(s.blocks):
            x = b(x)
            if i == 1 and x.abs().max().item() > 1e6:
                x = x * 0.5
        return s.h(x)


def go(rank, how, opts):
    torch.manual_seed(0)
    base = Branchy()

    def run(on):
        m = copy.deepcopy(base)
        en = lambda: planner.enable(m, 0.0009, costs="roofline", time_limit_s=2, now=True, capture="regions")
        if on and how == "before":
            en()
        d = DDP(m, bucket_cap_mb=0.005, **opts)
        if on and how != "before":
            en()
        o = torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9)
        torch.manual_seed(rank)
        out = []
        for i in range(8):
            x, y = torch.randn(16, 8, 32), torch.randint(4, (16,))
            cm = d.no_sync() if how == "accumulate" and i % 2 == 0 else contextlib.nullcontext()
            with cm:
                l = F.cross_entropy(d(x).mean(1), y)
                l.backward()
            if not (how == "accumulate" and i % 2 == 0):
                o.step()
                o.zero_grad()
            out.append(l.detach())
        return out, [p.detach().clone() for p in m.parameters()], planner.plan_of(m)

    a, b = run(True), run(False)
    return all(map(torch.equal, a[0], b[0])) and all(map(torch.equal, a[1], b[1])), None if a[
        2
    ] is None else (a[2].overhead, len(a[2].regions))


if __name__ == "__main__":
    from tests import zz_ddp

    r = Ranks(2)
    for how, o in (
        ("before", {}),
        ("after", {"gradient_as_bucket_view": True}),
        ("accumulate", {}),
        ("before", {"find_unused_parameters": True}),
        ("after", {"static_graph": True}),
    ):
        try:
            print(how, o, r(zz_ddp.go, how, o))
        except AssertionError as e:
            print("FAIL", how, o, str(e)[-1500:])
    r.stop()
