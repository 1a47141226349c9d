"""The checkers of notebook 2 take right answers, and say of wrong ones what is wrong."""

import numpy as np
import pytest
from exercises import n02_autograd as check
from solutions import n02_autograd as solution


def test_solutions_are_right():
    assert check.bell(solution.bell_backward).right
    assert check.product(solution.product_backward).right
    assert check.walk(solution.order, solution.gradient).right


def test_no_answer_is_told_so():
    for verdict in (
        check.bell(lambda dy, x: ...),
        check.bell(lambda dy, x: None),
        check.product(lambda dy, a, b: (..., ...)),
        check.product(lambda dy, a, b: (dy @ b, ...)),
        check.product(lambda dy, a, b: None),
        check.walk([...], ...),
        check.walk(solution.order, ...),
    ):
        assert not verdict.right and "..." in verdict.message


def y(x):
    return np.exp(-x * x)


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda dy, x: dy * 2 * x * y(x), "sign is wrong: right of 0"),
        (lambda dy, x: dy * -x * y(x), "derivative of x^2"),
        (lambda dy, x: -2 * x * y(x), "dy is missing: you give"),
        (lambda dy, x: 2 * x * y(x), "dy is missing, and"),
        (lambda dy, x: dy * y(x), "inner derivative is missing"),
        (lambda dy, x: dy * -2 * x, "derivative of the exponential"),
        (lambda dy, x: dy * -(x**2) * np.exp(-x * x - 1), "stays in the derivative"),
        (lambda dy, x: dy * x, "use the chain rule"),
        (lambda dy, x: dy * np.nan, "NaN"),
        (lambda dy, x: np.zeros(2), "shape (2,)"),
        (lambda dy, x: "falls", "not 'falls'"),
        (lambda dy, x: dy @ x, "raises ValueError"),
    ],
)
def test_wrong_bells(answer, told):
    verdict = check.bell(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda dy, a, b: dy @ b, "Return the two"),
        (lambda dy, a, b: (dy.T @ a, dy @ b), "wrong way round"),
        (lambda dy, a, b: (dy @ b, a.T @ dy), "db is transposed"),
        (lambda dy, a, b: ((dy @ b).T, dy.T @ a), "da is transposed"),
        (lambda dy, a, b: (-(dy @ b), dy.T @ a), "da has the wrong sign"),
        (lambda dy, a, b: (np.ones_like(dy) @ b, dy.T @ a), "da lacks dy"),
        (lambda dy, a, b: (dy @ b, np.ones_like(dy).T @ a), "db lacks dy"),
        (lambda dy, a, b: (2 * dy @ b, dy.T @ a), "da is 2 times"),
        (lambda dy, a, b: (dy @ b, 0 * b), "db is 0 times"),
        (lambda dy, a, b: (dy @ b, b), "db has the right shape"),
        (lambda dy, a, b: (dy @ b.T, dy.T @ a), "raises ValueError"),
        (lambda dy, a, b: (dy @ b, np.zeros(3)), "db has the shape (3,)"),
        (lambda dy, a, b: (dy @ b, dy.T @ a * np.nan), "db holds NaN"),
        (lambda dy, a, b: (dy @ b, "no"), "db"),
    ],
)
def test_wrong_products(answer, told):
    verdict = check.product(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "order, told",
    [
        (["y", "u", "v", "w"], "u is visited before v"),
        (["w", "u", "v", "y"], "v is visited before y"),
        (["y", "v", "w", "u"], "w is visited before u"),
        (["y", "v", "u"], "w is not visited"),
        (["y", "v", "u", "u", "w"], "u is visited more than once"),
        (["y", "x"], "'x' is none"),
        ([], "..."),
        ("yvuw", "list of names"),
    ],
)
def test_wrong_orders(order, told):
    verdict = check.walk(order, 33)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "gradient, told",
    [
        (9, "way through u is missing"),
        (24, "uses w as well"),
        (27, "only its use in v"),
        (15, "only its use in y"),
        (18, "through v and u"),
        (6, "straight to u"),
        (36, "value of y"),
        (5, "not 5"),
        (float("nan"), "not nan"),
        (np.zeros(3), "is a number"),
        ("many", "'many'"),
    ],
)
def test_wrong_gradients(gradient, told):
    verdict = check.walk(solution.order, gradient)
    assert not verdict.right and told in verdict.message
