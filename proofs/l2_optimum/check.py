"""What each loss learns on a linear generator with a quadratic reward."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import sympy
from harness import Claim, ball

HALF = sympy.Rational(1, 2)


def claims(second_order_weight: sympy.Rational = HALF) -> Iterator[Claim]:
    u, x, b, k, c = sympy.symbols("u x b k c", real=True)
    hh, s = sympy.symbols("h s", positive=True)
    # per eigendirection: r(g(u))/alpha = -h u^2/2 + b u, S = 1/(1+h)
    variance = 1 / (1 + hh)
    prox = sympy.solve(sympy.diff(-hh * u**2 / 2 + b * u - (u - x) ** 2 / 2, u), u)[0]
    yield Claim("the proximal map is S (x + b)", sympy.simplify(prox - variance * (x + b)) == 0, "symbolic")

    # the three losses over affine maps T x = k x + c, k > 0: E|f|^2/2 = ((k-1)^2 + c^2)/2, E[r] = -h(k^2+c^2)/2 + b c
    l2 = ((k - 1) ** 2 + c**2) / 2
    reward = -hh * (k**2 + c**2) / 2 + b * c
    error = {
        "l2": sympy.Integer(0),
        "second-order": second_order_weight * (k - 1) ** 2,
        "exact": (k - 1) - sympy.log(k),
    }
    slopes = {"l2": variance, "second-order": 2 / (2 + hh), "exact": sympy.sqrt(variance)}
    for name, term in error.items():
        loss = l2 + term - reward
        stationary = [
            sympy.simplify(sympy.diff(loss, k).subs(k, slopes[name])),
            sympy.simplify(sympy.diff(loss, c).subs(c, variance * b)),
        ]
        convex = sympy.simplify(sympy.diff(loss, k, 2)).subs({hh: 3, k: sympy.Rational(1, 2)}) > 0
        yield Claim(f"{name}: slope {slopes[name]}, mean S b", stationary == [0, 0] and bool(convex), "symbolic")
    # so the learned variances are S^2, 4/(2+h)^2 and S, in this order
    first = sympy.simplify(slopes["second-order"] ** 2 - slopes["l2"] ** 2)
    second = sympy.simplify(variance - slopes["second-order"] ** 2)
    yield Claim(
        "S^2 <= second order",
        sympy.simplify(first - hh * (3 * hh + 4) / ((2 + hh) ** 2 * (1 + hh) ** 2)) == 0,
        "symbolic",
    )
    yield Claim("second order <= S", sympy.simplify(second - hh**2 / ((1 + hh) * (2 + hh) ** 2)) == 0, "symbolic")

    # the price: KL(N(m, v^2) || N(m, S)) per direction is (v/S - 1 - log(v/S))/2
    gap = (variance**2 / variance - 1 - sympy.log(variance**2 / variance)) / 2
    closed = (s - 1 - sympy.log(s)) / 2
    yield Claim("L2 pays (s - 1 - log s)/2 nats", sympy.simplify(gap.subs(hh, 1 / s - 1) - closed) == 0, "symbolic")
    for value in (Fraction(1, 100), Fraction(1, 2), Fraction(99, 100), Fraction(2), Fraction(50)):
        t = ball(value)
        yield Claim(f"s - 1 - log s > 0 at s = {value}", bool(t - 1 - t.log() > 0), "ball arithmetic")


def counterexamples() -> Iterator[Claim]:
    # with a linear reward (h = 0) there is nothing to contract: S = 1, all three losses agree and the gap is zero
    s = sympy.Integer(1)
    yield Claim("h = 0: no price", (s - 1 - sympy.log(s)) / 2 == 0, "symbolic")
    # the L2 optimum is a gradient field: its Jacobian S - I is symmetric, the worst case for the L2 term
    a, b2, c2 = sympy.symbols("a b2 c2", real=True)
    hessian = sympy.Matrix([[a, b2], [b2, c2]])
    contraction = (sympy.eye(2) + hessian).inv() - sympy.eye(2)
    yield Claim(
        "its Jacobian is symmetric for any Hessian",
        sympy.simplify(contraction - contraction.T) == sympy.zeros(2),
        "symbolic",
    )


def false_claims() -> Iterator[Claim]:
    yield from claims(second_order_weight=sympy.Rational(1, 4))
