"""What makes a module compute something else than its type says is found, and no certificate is given."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from hnkit import InputError, noise_kl
from hnkit.errors import NotCertifiedError
from hnkit.linalg.convolution import convolution_norm_bound
from hnkit.lipschitz import JacobianBounds, Scaled, Sum, certified_bounds, certify_injective, lipschitz_upper, register

F64 = torch.float64


def linear(*rows):
    W = torch.tensor(rows, dtype=F64)
    module = nn.Linear(W.shape[1], W.shape[0], bias=False).double()
    with torch.no_grad():
        module.weight.copy_(W)
    return module


def secant(f, d=2):
    """The largest of many difference quotients of f: a lower bound of its Lipschitz constant."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, d, generator=g, dtype=F64) for _ in range(2))
    with torch.no_grad():
        return float(((f(x) - f(y)).norm(dim=1) / (x - y).norm(dim=1)).max())


# --- modules that occur more than once --------------------------------------------------------------------------------


def test_a_module_that_comes_twice_counts_twice():
    quarter = linear([0.0, -1.0], [1.0, 0.0])
    half = nn.Sequential(quarter, quarter)  # -x: T = 0
    assert secant(lambda x: x + half(x)) == 0
    assert certify_injective(half).status == "unknown"
    doubled = linear([2.0, 0.0], [0.0, 2.0])
    twice = nn.Sequential(doubled, doubled)
    assert lipschitz_upper(twice).value == pytest.approx(4)
    assert noise_kl(twice, torch.randn(4, 2, dtype=F64), method="l2").bias_bound is None

    leaky = nn.LeakyReLU(3.0)
    assert lipschitz_upper(nn.Sequential(leaky, leaky)).value == pytest.approx(9)
    inner = nn.Sequential(leaky, leaky)
    assert lipschitz_upper(nn.Sequential(inner, nn.Flatten(), inner)).value == pytest.approx(81)
    assert lipschitz_upper(Sum(leaky, leaky, inner)).value == pytest.approx(15)
    assert lipschitz_upper(nn.Sequential(Scaled(leaky, 2.0), Scaled(leaky, 2.0))).value == pytest.approx(36)


def test_tied_weights_count_in_every_module():
    first, second = linear([2.0, 0.0], [0.0, 1.0]), linear([0.0, 0.0], [0.0, 0.0])
    second.weight = first.weight
    assert lipschitz_upper(nn.Sequential(first, second)).value == pytest.approx(4)


# --- hooks, replaced calls, modes -------------------------------------------------------------------------------------


class Declared(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.inner = nn.Identity() if inner is None else inner

    def forward(self, x):
        return 0.5 * self.inner(x)

    def lipschitz_upper(self):
        return 0.5


def tripled(module, inputs, output):
    return 3 * output


def tripled_before(module, inputs):
    return (3 * inputs[0],)


@contextlib.contextmanager
def global_hook(register_hook, hook):
    handle = register_hook(hook)
    try:
        yield
    finally:
        handle.remove()


MODULES = {
    "a layer": lambda: linear([0.5, 0.0], [0.0, 0.5]),
    "a declared module": Declared,
    "a layer in containers": lambda: nn.Sequential(Sum(Scaled(nn.Tanh(), 0.5))),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_global_hooks(name, kind):
    module = MODULES[name]()
    assert certify_injective(module).status == "certified"
    hook = tripled if kind == "forward" else tripled_before
    with global_hook(getattr(nn.modules.module, f"register_module_{kind}_hook"), hook):
        assert secant(module) > 1
        with pytest.raises(NotCertifiedError, match="global forward hooks"):
            lipschitz_upper(module)
    assert certify_injective(module).status == "certified"


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize("where", ["itself", "a part"])
def test_hooks_of_a_module_that_declares_itself(kind, where):
    module = Declared()
    target = module if where == "itself" else module.inner
    getattr(target, f"register_{kind}_hook")(tripled if kind == "forward" else tripled_before)
    assert secant(module) > 1
    with pytest.raises(NotCertifiedError, match=r"Declared '0': (its part 'inner': )?it has forward hooks"):
        lipschitz_upper(nn.Sequential(module))


@pytest.mark.parametrize("name", ["forward", "_call_impl", "_compiled_call_impl"])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_calls_replaced_on_an_instance(name, make):
    module = make()
    setattr(module, name, lambda x: 3 * x)
    if name != "_call_impl":  # torch calls its own
        assert secant(module) > 1
    with pytest.raises(NotCertifiedError, match=f"{name}.* replaced|compiled or replaced"):
        lipschitz_upper(module)


def test_a_helper_of_forward_replaced_on_an_instance():
    module = nn.Conv1d(1, 1, 1, bias=False)
    module._conv_forward = lambda x, weight, bias: 100 * x
    with pytest.raises(NotCertifiedError, match="its _conv_forward was replaced on the instance"):
        lipschitz_upper(module)


@pytest.mark.parametrize(
    ("owner", "name", "replacement"),
    [
        (nn.Tanh, "forward", lambda self, x: 3 * x),
        (nn.Module, "_call_impl", lambda self, x: 3 * x),
        (nn.Module, "__call__", lambda self, x: 3 * x),
        (nn.Sequential, "__iter__", lambda self: iter(list(self._modules.values()) * 3)),
        (torch, "tanh", lambda x: 3 * x),
    ],
)
def test_calls_replaced_for_every_module(monkeypatch, owner, name, replacement):
    module = nn.Sequential(Scaled(nn.Tanh(), 0.5))
    assert lipschitz_upper(module).value == 0.5
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises(NotCertifiedError, match="replaced"):
        lipschitz_upper(module)


def test_functions_and_helpers_that_forward_calls_are_watched(monkeypatch):
    convolution, activation = nn.Conv1d(1, 1, 1), nn.SiLU()
    monkeypatch.setattr(nn.Conv1d, "_conv_forward", lambda self, x, weight, bias: 3 * x)
    monkeypatch.setattr(nn.functional, "silu", lambda x, inplace: 3 * x)
    for module in (convolution, activation):
        with pytest.raises(NotCertifiedError, match="replaced since its rule was registered"):
            lipschitz_upper(module)


def test_modes_that_change_what_torch_computes():
    class Tripled(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return 3 * result if function is torch.tanh else result

    module = Scaled(nn.Tanh(), 0.9)
    with Tripled():
        assert secant(module) > 1
        with pytest.raises(NotCertifiedError, match="mode is active"):
            lipschitz_upper(module)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(NotCertifiedError, match="autocast"):
        lipschitz_upper(linear([1.0]))
    with torch.device("cpu"):  # a mode that only says where tensors are made
        assert lipschitz_upper(module).value == 0.9


# --- subclasses and wrappers ------------------------------------------------------------------------------------------


def test_a_declaration_speaks_of_the_map_that_its_class_knew():
    class Louder(Declared):
        def forward(self, x):
            return 10 * super().forward(x)

    assert secant(Louder()) > 1
    with pytest.raises(NotCertifiedError, match=r"lipschitz_upper\(\) is Declared's, whose forward Louder overrides"):
        lipschitz_upper(Louder())

    class Declares:  # without a map of its own
        def lipschitz_upper(self):
            return 0.25

    class Quarter(Declares, nn.Module):
        def forward(self, x):
            return x / 4

    assert lipschitz_upper(Quarter()).value == 0.25

    class Callable:
        def __call__(self, x):
            return x / 2

        def lipschitz_upper(self):
            return 0.5

    class LouderCallable(Callable):
        def __call__(self, x):
            return 10 * x

    assert lipschitz_upper(Callable()).value == 0.5
    assert certify_injective(LouderCallable()).status == "unknown"


def test_a_stale_interval_is_no_longer_declared():
    class Monotone(Declared):
        def field_of_values(self):
            return 0.0, 0.5

    class Turned(Monotone):
        def forward(self, x):
            return -4 * x

        def lipschitz_upper(self):
            return 4.0

    assert certified_bounds(Monotone()).lower == 0
    with pytest.raises(NotCertifiedError, match=r"field_of_values\(\) is Monotone's"):
        certified_bounds(Turned())


def test_a_wrapper_that_passes_attributes_on_does_not_declare():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 10 * self.inner(x)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    wrapped = Wrapper(Declared())
    assert wrapped.lipschitz_upper() == 0.5
    assert secant(wrapped) > 1
    assert certify_injective(wrapped).status == "unknown"


def test_a_class_that_poses_as_parametrised():
    class Posing(nn.Linear):
        parametrizations = nn.ModuleDict({"weight": nn.Identity()})

        def forward(self, x):
            return 10 * super().forward(x)

    assert certify_injective(Posing(2, 2)).status == "unknown"


# --- parametrisations -------------------------------------------------------------------------------------------------


class Growing(nn.Module):
    """Twice the weight at every call, in training and in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.01, dtype=F64))

    def forward(self, weight):
        self.factor.mul_(2)
        return self.factor * weight


def test_a_parametrisation_with_a_state():
    module = linear([1.0, 0.0], [0.0, 1.0])
    parametrize.register_parametrization(module, "weight", Growing())
    module.eval()
    with pytest.raises(NotCertifiedError, match="parametrisation Growing may return other weights"):
        lipschitz_upper(module)
    parametrize.remove_parametrizations(module, "weight")
    assert lipschitz_upper(module).value < 1


@pytest.mark.parametrize("name", ["spectral_norm", "orthogonal", "weight_norm"])
def test_torchs_own_parametrisations_in_eval_mode(name):
    module = getattr(nn.utils.parametrizations, name)(nn.Linear(3, 3).double()).eval()
    norm = float(torch.linalg.matrix_norm(module.weight.detach(), 2))
    assert lipschitz_upper(module).value == pytest.approx(norm, rel=1e-12)
    part = module.parametrizations.weight[0]
    part.train()  # a power iteration at each call
    with pytest.raises(NotCertifiedError, match="training mode"):
        lipschitz_upper(module)
    part.eval()
    part.register_forward_hook(tripled)
    with pytest.raises(NotCertifiedError, match="it has forward hooks"):
        lipschitz_upper(module)


def test_cached_parametrised_weights():
    module = nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)).eval()
    with parametrize.cached(), pytest.raises(NotCertifiedError, match=r"parametrize.cached\(\)"):
        lipschitz_upper(module)


# --- layers whose settings say something else -------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "threshold"), [(1e-9, 20), (1, 20), (1, 30), (2, 5)])
def test_softplus_jumps_at_its_threshold(beta, threshold):
    """By `log(1 + e^-t)/beta`, which is 2 for beta = 1e-9 and the default threshold, and 2e-9 for beta = 1."""
    module, at = nn.Softplus(beta, threshold), threshold / beta
    below, above = torch.tensor([at, math.nextafter(at, math.inf)], dtype=F64)
    assert float((module(above) - module(below)).abs() / (above - below)) > 10
    with pytest.raises(NotCertifiedError, match="it jumps"):
        lipschitz_upper(module)


@pytest.mark.parametrize(("beta", "threshold"), [(1, 36), (1e-9, 40), (7, 88)])
def test_softplus_with_a_step_below_rounding(beta, threshold):
    module, at = nn.Softplus(beta, threshold), threshold / beta
    x = at * (1 + torch.linspace(-1e-6, 1e-6, 20_001, dtype=F64))
    rise = module(x).diff() / x.diff()
    assert float(rise.max()) <= lipschitz_upper(module).value + 1e-3  # differences of 1e-10, rounded at 1e-16
    assert float(rise.min()) >= 0


def test_softplus_that_overflows_before_its_threshold():
    module = nn.Softplus(threshold=100)
    assert math.isinf(float(module(torch.tensor(95.0))))
    with pytest.raises(NotCertifiedError, match="between 36 and 88"):
        lipschitz_upper(module)


@pytest.mark.parametrize(
    "module", [nn.Softmax(0), nn.Softmax(), nn.Softmin(-2), nn.Flatten(-2), nn.Flatten(0), nn.Unflatten(-2, (1, 2))]
)
def test_layers_that_may_mix_the_rows_of_a_batch(module):
    with pytest.raises(NotCertifiedError, match="batch dimension"):
        lipschitz_upper(module)


def test_padding_is_what_forward_pads_by():
    module = nn.Conv1d(1, 1, 1, padding=2, padding_mode="replicate", bias=False).double()
    nn.init.ones_(module.weight)
    module.padding = (0,)  # forward reads what was noted when the layer was made
    x = torch.zeros(1, 1, 1, dtype=F64)
    norm = float(torch.autograd.functional.jacobian(module, x).norm())
    assert norm == pytest.approx(5**0.5)
    assert lipschitz_upper(module).value >= norm


def test_a_kernel_replaced_by_a_wider_one():
    module = nn.Conv1d(1, 1, 1, padding=1, padding_mode="circular", bias=False).double()
    module.weight = nn.Parameter(torch.ones(1, 1, 3, dtype=F64))
    assert lipschitz_upper(module).value == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("scale", [1e-170, 1e-200, 1e-310])
def test_convolutions_of_tiny_weights_keep_their_norm(scale):
    """Their squares are 0 in floating point; the layer behind may bring them back."""
    weight = torch.full((1, 1, 3), scale, dtype=F64)
    assert float(weight.sum()) <= convolution_norm_bound(weight, (1,), (1,)) <= 1.01 * float(weight.sum())
    module = nn.Conv1d(1, 1, 3, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(weight)
    assert lipschitz_upper(nn.Sequential(module, Scaled(nn.Identity(), 1e170))).value >= 3 * scale * 1e170


def test_bounds_that_overflow_are_no_certificates():
    module = nn.Sequential(Scaled(nn.Tanh(), 1e200), Scaled(nn.Tanh(), 1e200))
    with pytest.raises(NotCertifiedError, match="not finite"):
        lipschitz_upper(module)
    with pytest.raises(NotCertifiedError, match="not finite"):
        lipschitz_upper(linear([1.5e308, 1.5e308], [1.5e308, 1.5e308]))


# --- layers that overwrite their input --------------------------------------------------------------------------------

IN_PLACE = {
    "alone": lambda: nn.ReLU(inplace=True),
    "behind views": lambda: nn.Sequential(nn.Flatten(), nn.Dropout().eval(), nn.Sequential(nn.SiLU(inplace=True))),
    "in the first term": lambda: Sum(nn.Sequential(nn.Identity(), nn.LeakyReLU(0.5, inplace=True)), nn.Identity()),
    "scaled": lambda: Scaled(nn.Hardtanh(inplace=True), -0.5),
    "behind a sum of one": lambda: nn.Sequential(Sum(nn.Identity()), nn.ReLU(inplace=True)),
    "behind padding by nothing": lambda: nn.Sequential(nn.PixelShuffle(1), nn.ELU(inplace=True)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_map_that_overwrites_its_input(name):
    """`x + f(x)` would add what f left of x."""
    module = IN_PLACE[name]()
    x = torch.linspace(-2, 2, 8, dtype=F64).reshape(2, 1, 2, 2)
    if name != "behind padding by nothing":  # which torch copies, today
        before = x.clone()
        module(x)
        assert not torch.equal(x, before)
    with pytest.raises(NotCertifiedError, match="works in place"):
        lipschitz_upper(module)


def test_layers_that_overwrite_what_only_they_hold():
    linear_ = linear([1.0, 0.0], [0.0, 1.0])
    module = nn.Sequential(linear_, nn.Sequential(nn.ReLU(inplace=True), Scaled(nn.SiLU(inplace=True), 2.0)))
    plain = nn.Sequential(linear_, nn.Sequential(nn.ReLU(), Scaled(nn.SiLU(), 2.0)))
    x = torch.randn(5, 2, dtype=F64)
    assert torch.equal(module(x.clone()), plain(x))
    assert lipschitz_upper(Sum(nn.Identity(), module)).value == lipschitz_upper(Sum(nn.Identity(), plain)).value
    assert lipschitz_upper(nn.Dropout(inplace=True).eval()).value == 1  # does nothing


# --- what is declared, registered or given ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        ((0.5, -0.25), r"returned \(0.5, -0.25\): the lower end comes first"),
        ((5.0, 7.0), "contradict"),
        ((-7.0, -5.0), "contradict"),
        (3.0, "a pair"),
        ((1.0, 2.0, 3.0), "a pair"),
        ((math.nan, 0.0), "finite number"),
        (("a", 0.0), "finite number"),
    ],
)
def test_intervals_that_cannot_be_true(interval, message):
    class Turned(Declared):
        def field_of_values(self):
            return interval

    with pytest.raises(NotCertifiedError, match=message):
        certified_bounds(Turned())
    assert certify_injective(Turned()).status == "unknown"


@pytest.mark.parametrize(
    "bounds",
    [JacobianBounds(0.5, 1.0, -1.0), JacobianBounds(-1.0, -1.0, 1.0), JacobianBounds(math.nan, 0, 0), 0.5, None],
    ids=str,
)
def test_rules_that_return_what_cannot_be_true(bounds):
    class Ruled(nn.Module):
        def forward(self, x):
            return 4 * x

    register(Ruled)(lambda module, visit: bounds)
    with pytest.raises(NotCertifiedError, match=r"its rule returned|not finite"):
        lipschitz_upper(Ruled())


def test_a_rule_may_visit_what_is_no_module():
    class Odd(nn.Module):
        def forward(self, x):
            return x

    register(Odd)(lambda module, visit: visit(torch.sin, "inner"))
    with pytest.raises(NotCertifiedError, match="'inner' is a builtin_function_or_method, not a module"):
        lipschitz_upper(Odd())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scaled(nn.Tanh(), "x"), r"Scaled\(factor='x'\) is no real number"),
        (lambda: Scaled(nn.Tanh(), "0.5"), r"Scaled\(factor='0.5'\) is no real number"),
        (lambda: Scaled(nn.Tanh(), None), r"factor=None"),
        (lambda: Scaled(nn.Tanh(), torch.ones(2)), r"no real number"),
        (lambda: Scaled(torch.tanh, 0.5), r"Scaled of builtin_function_or_method .*: give modules"),
        (lambda: Sum(nn.Tanh(), 3), r"Sum of int 3: give modules"),
        (lambda: noise_kl(torch.tanh, torch.zeros(2, 3), method="power", lipschitz="a"), r"lipschitz 'a'"),
        (lambda: lipschitz_upper(nn.Linear(2, 2, device="meta")), r"Linear: its bias has no values \(device meta\)"),
        (lambda: lipschitz_upper(nn.Conv1d(2, 2, 1, bias=False, device="meta")), r"Conv1d: its weight has no values"),
        (lambda: lipschitz_upper(nn.PReLU(device="meta")), r"PReLU: its weight has no values"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_weights_of_other_kinds():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            result = super().__torch_function__(function, types, args, kwargs or {})
            return 3 * result if function is nn.functional.linear else result

    module = linear([0.5, 0.0], [0.0, 0.5])
    module.weight = nn.Parameter(torch.Tensor._make_subclass(Loud, module.weight.detach().clone()), requires_grad=False)
    assert secant(module) > 1
    with pytest.raises(NotCertifiedError, match="Loud"):
        lipschitz_upper(module)
    for broken in (math.nan, math.inf):
        module = nn.Linear(2, 2)
        with torch.no_grad():
            module.bias[0] = broken
        with pytest.raises(NotCertifiedError, match="its bias is not real and finite"):
            lipschitz_upper(module)
    with pytest.raises(NotCertifiedError, match="layer LazyLinear"):
        lipschitz_upper(nn.LazyLinear(3))


def test_half_precision_weights_are_taken_as_they_are():
    W = torch.tensor([[0.1, 0.7], [0.3, -0.2]], dtype=torch.bfloat16)
    module = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        module.weight.copy_(W)
    assert lipschitz_upper(module).value >= float(torch.linalg.matrix_norm(W.double(), 2))
    gradient = nn.Sequential(module, nn.Tanh(), nn.Linear(2, 2, bias=False, dtype=torch.float32))
    with torch.no_grad():
        gradient[2].weight.copy_(W.T)
    assert certified_bounds(gradient).lower == 0  # W' tanh(W x), stored in two types
