"""Adam's formulas as implementations write them; each is a function of a `steps.Kernel`.

Names of scalars (`k.s`): see `scalars`. What a formula returns is rounded once more, to the format in which
the tensor is kept; `k.rounded` is the rounding after each operator, where an implementation has one.
"""

from collections.abc import Callable

import numpy as np

from jaxaudit.floats import FLOAT16, FLOAT32, Format
from jaxaudit.operations import Value
from jaxaudit.steps import Kernel

#: Corrects a moment, of a number, for its bias.
Correction = Callable[[Kernel, Value, int], Value]

# Gradients, with L2 decay where it is on.


def gradient_cpu(k: Kernel) -> Value:
    """`grad.add(param, alpha=weight_decay)` of ATen on CPU.

    The vectorised loop rounds once (a product of two 16-bit values is exact in float32). The scalar loop of
    16-bit formats rounds the product to the storage format first; so does all of a build without fused
    multiply-add. In float32, and in fused optimizers, both loops are alike.
    """
    g, ops = k.plain_gradient(), k.ops
    if k.step.decay != "l2":
        return g
    if not k.step.rounds_operators or k.step.storage is FLOAT32:
        return k.fused(k.s["l2"], k.x["param"], g, "the L2 term")
    product = k.rounded(ops.multiply(k.s["l2"], k.x["param"]), "the L2 product")
    scalar = k.rounded(ops.add(g, product), "the decayed gradient")
    if not k.step.fuses:
        return scalar
    vector = k.rounded(ops.fma(k.s["l2"], k.x["param"], g), "the decayed gradient")
    return ops.where(k.tail(), scalar, vector)


def gradient_cuda(k: Kernel) -> Value:
    """`grad.add(param, alpha=weight_decay)` of ATen on CUDA: fused, one rounding."""
    g = k.plain_gradient()
    if k.step.decay != "l2":
        return g
    return k.rounded(k.fused(k.s["l2"], k.x["param"], g, "the L2 term"), "the decayed gradient")


# First moments.


def exp_avg_lerp(k: Kernel) -> Value:
    """`lerp(m, g, 1 - beta1)`: fma(w, g - m, m); where w >= 0.5 fma(w - 1, g - m, g).

    In the latter case the scalar loop computes g - (g - m)*(1 - w).
    """
    ops, g, m = k.ops, k.gradient(), k.x["exp_avg"]
    change = ops.subtract(g, m)
    where = "the interpolation of exp_avg"
    if k.step.interpolation == "start":
        return k.fused(k.s["exp_avg_weight"], change, m, where)
    at_end, scalar_loop = k.s["exp_avg_from_end"] != 0, k.tail()
    # One fused operation whichever end is nearer: LLVM does not contract a product that two sums share.
    nearer = g if k.step.interpolation == "end" else ops.where(at_end, g, m)
    vector = k.fused(k.s["exp_avg_weight"], change, nearer, where)
    # g - (g - m)*(1 - w) differs where w is 1: in the sign of zero, for a gradient of -0.
    scalar = k.fused(k.s["exp_avg_rest"], ops.negate(change), g, where)
    if k.step.interpolation == "mixed":
        scalar_loop = scalar_loop & at_end
    return ops.where(scalar_loop, scalar, vector)


def exp_avg_lerp_cuda(k: Kernel) -> Value:
    """As `exp_avg_lerp`; from the other end all elements are g - (g - m)*(1 - w)."""
    ops, g, m = k.ops, k.gradient(), k.x["exp_avg"]
    change, where = ops.subtract(g, m), "the interpolation of exp_avg"
    if k.step.interpolation == "start":
        return k.fused(k.s["exp_avg_weight"], change, m, where)
    return k.fused(k.s["exp_avg_rest"], ops.negate(change), g, where)


def exp_avg_fused_cuda(k: Kernel) -> Value:
    """fma(beta1, m, fma(-beta1, g, g)), all in float32."""
    g, beta1 = k.gradient(), k.s["beta1"]
    rest = k.fused(k.ops.negate(beta1), g, g, "(1 - beta1) * grad")
    return k.fused(beta1, k.x["exp_avg"], rest, "exp_avg")


def exp_avg_fused_cuda_legacy(k: Kernel) -> Value:
    """beta1*m + (1 - beta1)*g in double, rounded to float32 once; either product may be the fused one."""
    ops, g, m = k.ops, k.ops.wide(k.gradient()), k.ops.wide(k.x["exp_avg"])
    if k.meets("fusion in exp_avg, of the other product"):
        return ops.narrow(
            ops.wide_fma(k.s["beta1"], m, ops.wide_multiply(k.s["one_minus_beta1"], g))
        )
    return ops.narrow(ops.wide_fma(k.s["one_minus_beta1"], g, ops.wide_multiply(k.s["beta1"], m)))


# Second moments.


def _decayed_exp_avg_sq(k: Kernel) -> Value:
    """`v.mul(beta2)`."""
    decayed = k.ops.multiply(k.x["exp_avg_sq"], k.s["beta2"])
    return k.rounded(decayed, "the decayed exp_avg_sq", k.step.exp_avg_sq_format)


def exp_avg_sq_cpu(k: Kernel) -> Value:
    """`v.mul(beta2)`, then `addcmul(g, g, value=1 - beta2)`: fma((1 - beta2)*g, g, v)."""
    g, decayed = k.gradient(), _decayed_exp_avg_sq(k)
    scaled = k.ops.multiply(k.s["exp_avg_sq_weight"], g)
    return k.fused(scaled, g, decayed, "exp_avg_sq")


def exp_avg_sq_fused_cpu(k: Kernel) -> Value:
    """As `exp_avg_sq_cpu`, unrounded; the scalar loop fuses the other product: fma(v, beta2, (c*g)*g)."""
    g, ops, v = k.gradient(), k.ops, k.x["exp_avg_sq"]
    scaled = ops.multiply(k.s["exp_avg_sq_weight"], g)
    vector = k.fused(scaled, g, ops.multiply(v, k.s["beta2"]), "exp_avg_sq")
    if not k.step.fuses:
        return vector
    return ops.where(k.tail(), ops.fma(v, k.s["beta2"], ops.multiply(scaled, g)), vector)


def exp_avg_sq_cuda(k: Kernel) -> Value:
    """As `exp_avg_sq_cpu` with the square first: fma(1 - beta2, g*g, v)."""
    g, decayed = k.gradient(), _decayed_exp_avg_sq(k)
    square = k.ops.multiply(g, g)
    return k.fused(k.s["exp_avg_sq_weight"], square, decayed, "exp_avg_sq")


def exp_avg_sq_fused_cuda(k: Kernel) -> Value:
    """fma(beta2, v, fma(-beta2, g*g, g*g)), all in float32."""
    g, beta2 = k.gradient(), k.s["beta2"]
    square = k.ops.multiply(g, g)
    rest = k.fused(k.ops.negate(beta2), square, square, "(1 - beta2) * grad^2")
    return k.fused(beta2, k.x["exp_avg_sq"], rest, "exp_avg_sq")


def exp_avg_sq_fused_cuda_legacy(k: Kernel) -> Value:
    """beta2*v + ((1 - beta2)*g)*g in double, rounded to float32 once; either product may be the fused one."""
    ops, g, v = k.ops, k.ops.wide(k.gradient()), k.ops.wide(k.x["exp_avg_sq"])
    scaled = ops.wide_multiply(k.s["one_minus_beta2"], g)
    if k.meets("fusion in exp_avg_sq, of the other product"):
        return ops.narrow(ops.wide_fma(k.s["beta2"], v, ops.wide_multiply(scaled, g)))
    return ops.narrow(ops.wide_fma(scaled, g, ops.wide_multiply(k.s["beta2"], v)))


def _maximum(k: Kernel, old: Value, new: Value) -> Value:
    """Return the larger one; NaN where either is NaN."""
    return k.ops.where(k.ops.less(old, new) | k.ops.is_nan(new), new, old)


def largest(k: Kernel) -> Value:
    """`torch.maximum(v_max, v)`."""
    return _maximum(k, k.x["max_exp_avg_sq"], k.new_exp_avg_sq())


def largest_fused_cpu(k: Kernel) -> Value:
    """As `largest`; the scalar loop takes `v_max < v ? v : v_max`, which leaves out a NaN in v."""
    old, new = k.x["max_exp_avg_sq"], k.new_exp_avg_sq()
    scalar = k.ops.where(k.ops.less(old, new), new, old)
    return k.ops.where(k.tail(), scalar, _maximum(k, old, new))


# New weights.


def decayed_weight(k: Kernel) -> Value:
    """`p.mul(1 - lr*weight_decay)` where decay is decoupled."""
    if k.step.decay != "decoupled":
        return k.x["param"]
    return k.rounded(k.ops.multiply(k.x["param"], k.s["decay"]), "the decayed weight")


def _root(k: Kernel) -> Value:
    """`sqrt(v)`: ATen calls the library for a float32 tensor; it takes the root of a 16-bit one itself."""
    fmt, second = k.step.exp_avg_sq_format, k.new_second_moment()
    own = k.step.rounds_operators and fmt is not FLOAT32
    return k.rounded(k.ops.sqrt(second) if own else k.sqrt(second), "sqrt(exp_avg_sq)", fmt)


def denominator(k: Kernel) -> Value:
    """`(sqrt(v) / sqrt(1 - beta2^t)) + eps`."""
    fmt, root = k.step.exp_avg_sq_format, _root(k)
    root = k.rounded(k.ops.divide(root, k.s["bias_correction2_sqrt"]), "the corrected root", fmt)
    return k.rounded(k.ops.add(root, k.s["epsilon"]), "the denominator", fmt)


def reciprocal_denominator(k: Kernel) -> Value:
    """`denominator` where the root is multiplied by the reciprocal of its bias correction."""
    fmt = k.step.exp_avg_sq_format
    root = k.ops.multiply(_root(k), k.s["reciprocal_bias_correction2_sqrt"])
    root = k.rounded(root, "the corrected root", fmt)
    return k.rounded(k.ops.add(root, k.s["epsilon"]), "the denominator", fmt)


def param_cpu(k: Kernel) -> Value:
    """`addcdiv(m, d, value=-step_size)` on CPU: p + (value*m)/d."""
    weight = decayed_weight(k)
    numerator = k.ops.multiply(k.s["step_size"], k.new_exp_avg())
    return k.ops.add(weight, k.ops.divide(numerator, denominator(k)))


def param_cuda(k: Kernel) -> Value:
    """`addcdiv(m, d, value=-step_size)` on CUDA: fma(value, m/d, p)."""
    quotient = k.ops.divide(k.new_exp_avg(), denominator(k))
    return k.fused(k.s["step_size"], quotient, decayed_weight(k), "the update")


def param_cuda_reciprocal(k: Kernel) -> Value:
    """As `param_cuda`; the loop over tensors divides by a Python number, which multiplies by its reciprocal."""
    quotient = k.ops.divide(k.new_exp_avg(), reciprocal_denominator(k))
    return k.fused(k.s["step_size"], quotient, decayed_weight(k), "the update")


def param_fused_cuda(k: Kernel) -> Value:
    """Compute p - (step_size*m)/d in float32; decoupled decay is fma(-(lr*weight_decay), p, p)."""
    weight = k.x["param"]
    if k.step.decay == "decoupled":
        weight = k.fused(k.s["minus_rate_times_decay"], weight, weight, "the decayed weight")
    numerator = k.ops.multiply(k.s["step_size"], k.new_exp_avg())
    return k.ops.add(weight, k.ops.divide(numerator, denominator(k)))


def param_fused_cuda_legacy(k: Kernel) -> Value:
    """As `param_fused_cuda`, with products by hyperparameters and the sum with eps in double."""
    ops, weight = k.ops, k.x["param"]
    if k.step.decay == "decoupled":
        wide = ops.wide(weight)
        weight = ops.narrow(ops.wide_fma(k.s["minus_rate_times_decay"], wide, wide))
    root = ops.divide(k.sqrt(k.new_second_moment()), k.s["bias_correction2_sqrt"])
    divisor = ops.narrow(ops.wide_add(ops.wide(root), k.s["epsilon"]))
    numerator = ops.multiply(k.s["step_size"], k.new_exp_avg())
    return ops.add(weight, ops.divide(numerator, divisor))


def gradient_fused_cuda_legacy(k: Kernel) -> Value:
    """Compute grad + param*weight_decay in double, rounded to float32 once."""
    g, ops = k.plain_gradient(), k.ops
    if k.step.decay != "l2":
        return g
    return ops.narrow(ops.wide_fma(ops.wide(k.x["param"]), k.s["l2"], ops.wide(g)))


def param_textbook(k: Kernel) -> Value:
    """Compute p - (lr * (m / (1 - beta1^t))) / (sqrt(v / (1 - beta2^t)) + eps), from left to right."""
    ops = k.ops
    corrected = ops.divide(k.new_exp_avg(), k.s["bias_correction1"])
    root = ops.sqrt(ops.divide(k.new_second_moment(), k.s["bias_correction2"]))
    change = ops.multiply(k.s["learning_rate"], corrected)
    return ops.subtract(decayed_weight(k), ops.divide(change, ops.add(root, k.s["epsilon"])))


# capturable=True: the step count and what is made of it are float32 tensors.


def param_capturable_loop(k: Kernel) -> Value:
    """`denom = (sqrt(v) / (bias_correction2_sqrt * -step_size)) + eps / -step_size; p.addcdiv(m, denom)`.

    `capturable_divisor` and `capturable_epsilon` are these two scalars. On CUDA addcdiv of value 1 is the
    quotient added.
    """
    root = _root(k)
    root = k.rounded(k.ops.divide(root, k.s["capturable_divisor"]), "the corrected root")
    divisor = k.rounded(k.ops.add(root, k.s["capturable_epsilon"]), "the denominator")
    return k.ops.add(decayed_weight(k), k.ops.divide(k.new_exp_avg(), divisor))


def param_capturable_foreach(k: Kernel) -> Value:
    """sqrt(v) divided by the root of its bias correction, + eps, divided by minus the step size; p + m/d."""
    divisor = denominator(k)
    divisor = k.rounded(k.ops.divide(divisor, k.s["capturable_divisor"]), "the scaled denominator")
    return k.ops.add(decayed_weight(k), k.ops.divide(k.new_exp_avg(), divisor))


# Kahan summation: what was lost when the weight was rounded is added to the next update.


def _kahan_sum(k: Kernel, divisor: Value) -> tuple[Value, Value, Value]:
    """Return the decayed weight, the compensated update R(c + (-lr*m)/d), and the new weight R(p + update)."""
    ops, weight = k.ops, decayed_weight(k)
    quotient = ops.divide(ops.multiply(k.s["step_size"], k.new_exp_avg()), divisor)
    update = k.rounded(ops.add(k.x["compensation"], quotient), "the compensated update")
    return weight, update, k.rounded(ops.add(weight, update), "the new weight")


def _kahan_rest(k: Kernel, divisor: Value) -> Value:
    """Return R(c + R(p - p')) of the compensated update c and the new weight p'."""
    weight, update, new = _kahan_sum(k, divisor)
    lost = k.rounded(k.ops.subtract(weight, new), "the lost part")
    return k.ops.add(update, lost)


def param_kahan(k: Kernel) -> Value:
    """R(p + R(c + (-lr*m)/d))."""
    return _kahan_sum(k, denominator(k))[2]


def compensation_kahan(k: Kernel) -> Value:
    """The part of the update that `param_kahan` lost."""
    return _kahan_rest(k, denominator(k))


def param_kahan_optimi(k: Kernel) -> Value:
    """As `param_kahan`, without bias correction in the denominator."""
    return _kahan_sum(k, plain_denominator(k))[2]


def compensation_kahan_optimi(k: Kernel) -> Value:
    """The part of the update that `param_kahan_optimi` lost."""
    return _kahan_rest(k, plain_denominator(k))


def plain_denominator(k: Kernel) -> Value:
    """`sqrt(v) + eps`, without bias correction."""
    return k.rounded(
        k.ops.add(_root(k), k.s["epsilon"]), "the denominator", k.step.exp_avg_sq_format
    )


def param_optimi(k: Kernel) -> Value:
    """Compute p + (-lr*m)/d without Kahan summation."""
    numerator = k.ops.multiply(k.s["step_size"], k.new_exp_avg())
    return k.ops.add(decayed_weight(k), k.ops.divide(numerator, plain_denominator(k)))


# torchdistx's AnyPrecisionAdamW.


def exp_avg_anyprecision(k: Kernel) -> Value:
    """`m.mul(beta1).add(g, alpha=1 - beta1)`; the addition has a scalar loop where all is of one 16-bit format."""
    ops, g, fmt = k.ops, k.gradient(), k.step.exp_avg_format
    decayed = ops.multiply(k.x["exp_avg"], k.s["beta1"])
    decayed = k.rounded(decayed, "the decayed exp_avg", fmt)
    vector = k.fused(k.s["exp_avg_weight"], g, decayed, "exp_avg")
    if fmt is FLOAT32 or k.step.storage is not fmt:
        return vector
    product = k.rounded(ops.multiply(k.s["exp_avg_weight"], g), "(1 - beta1) * grad", fmt)
    scalar = ops.add(decayed, product)
    return ops.where(k.tail(), scalar, vector) if k.step.fuses else scalar


# torchao: everything in float32, and rounded when it is stored.


def gradient_torchao(k: Kernel) -> Value:
    """Add weight_decay*p to the gradient, not fused."""
    g = k.plain_gradient()
    if k.step.decay != "l2":
        return g
    return k.ops.add(g, k.ops.multiply(k.s["l2"], k.x["param"]))


def exp_avg_torchao(k: Kernel) -> Value:
    """`lerp(m, g, 1 - beta1)` in float32."""
    return _lerp_torchao(k, "exp_avg", k.x["exp_avg"], k.gradient())


def exp_avg_sq_torchao(k: Kernel) -> Value:
    """`lerp(v, g*g, 1 - beta2)` in float32."""
    g = k.gradient()
    return _lerp_torchao(k, "exp_avg_sq", k.x["exp_avg_sq"], k.ops.multiply(g, g))


def _lerp_torchao(k: Kernel, name: str, old: Value, new: Value) -> Value:
    weight = k.s[f"{name}_weight" if k.step.fuses else f"{name}_weight_of_double"]
    at_end, change = k.s[f"{name}_from_end"] != 0, k.ops.subtract(new, old)
    start, where = k.ops.where(at_end, new, old), f"the interpolation of {name}"
    vector = k.fused(weight, change, start, where)
    if not k.step.fuses or name != "exp_avg":
        return vector
    # ATen's scalar loop, as in `exp_avg_lerp`; a square is never -0.
    scalar = k.fused(k.s["exp_avg_rest"], k.ops.negate(change), new, where)
    return k.ops.where(k.tail() & at_end, scalar, vector)


def param_torchao(k: Kernel) -> Value:
    """Compute p - (lr*(m/bias_correction1)) / (sqrt(v)/sqrt(bias_correction2) + eps).

    Decay comes before it: p - (lr*weight_decay)*p.
    """
    ops, weight = k.ops, k.x["param"]
    if k.step.decay == "decoupled":
        weight = ops.subtract(weight, ops.multiply(k.s["rate_times_decay"], weight))
    divisor = denominator(k)
    corrected = ops.divide(k.new_exp_avg(), k.s["bias_correction1"])
    change = ops.divide(ops.multiply(k.s["learning_rate"], corrected), divisor)
    return ops.subtract(weight, change)


# optax: every operator rounds; XLA turns the division by a bias correction into a multiplication by its reciprocal,
# unless several arrays of a tree are divided by it.


def gradient_optax(k: Kernel) -> Value:
    """`add_decayed_weights` before the moments: g + weight_decay*p."""
    g, ops = k.plain_gradient(), k.ops
    if k.step.decay != "l2":
        return g
    product = k.rounded(ops.multiply(k.s["l2"], k.x["param"]), "the L2 product")
    return k.rounded(ops.add(g, product), "the decayed gradient")


def exp_avg_optax(k: Kernel) -> Value:
    """(1 - beta1)*g + beta1*m."""
    ops = k.ops
    new = k.rounded(ops.multiply(k.s["exp_avg_weight"], k.gradient()), "(1 - beta1) * grad")
    old = ops.multiply(k.s["beta1"], k.x["exp_avg"])
    return ops.add(new, k.rounded(old, "the decayed exp_avg", k.step.exp_avg_format))


def exp_avg_sq_optax(k: Kernel) -> Value:
    """(1 - beta2)*g^2 + beta2*v."""
    ops, g = k.ops, k.gradient()
    square = k.rounded(ops.multiply(g, g), "grad^2")
    new = k.rounded(ops.multiply(k.s["exp_avg_sq_weight"], square), "(1 - beta2) * grad^2")
    old = k.rounded(ops.multiply(k.s["beta2"], k.x["exp_avg_sq"]), "the decayed exp_avg_sq")
    return ops.add(new, old)


def largest_optax(k: Kernel) -> Value:
    """The largest second moment, bias-corrected, so far (`optax.amsgrad`)."""
    return _largest_optax(k, _by_reciprocals)


def largest_optax_over_trees(k: Kernel) -> Value:
    """As `largest_optax`, with the division."""
    return _largest_optax(k, _by_divisions)


def _largest_optax(k: Kernel, correct: Correction) -> Value:
    larger = _maximum(k, k.x["max_exp_avg_sq"], _corrected_optax(k, correct))
    # The product takes a subnormal number for zero where XLA does.
    return k.ops.multiply(larger, np.float32(1))


def _by_reciprocals(k: Kernel, moment: Value, number: int) -> Value:
    return k.ops.multiply(moment, k.s[f"reciprocal_bias_correction{number}"])


def _by_divisions(k: Kernel, moment: Value, number: int) -> Value:
    return k.ops.divide(moment, k.s[f"bias_correction{number}"])


def _corrected_optax(k: Kernel, correct: Correction) -> Value:
    second = k.new_exp_avg_sq()
    if not k.step.reads_stored:  # of the moments, only the first has a format of its own
        second = k.ops.round_to(second, k.step.exp_avg_sq_format)
    return k.rounded(correct(k, second, 2), "the corrected exp_avg_sq")


def _root_optax(k: Kernel, correct: Correction) -> Value:
    # optax adds an `eps_root` of 0 first, which could change -0 only: no second moment is that.
    second = k.new_second_moment() if k.step.amsgrad else _corrected_optax(k, correct)
    return k.ops.sqrt(second)


def _update_format(k: Kernel) -> Format:
    same = k.step.storage is k.step.exp_avg_format
    return k.step.storage if same else FLOAT32


def param_optax(k: Kernel) -> Value:
    """Compute p + -lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay*p)."""
    return _param_optax(k, _by_reciprocals)


def param_optax_over_trees(k: Kernel) -> Value:
    """As `param_optax`, with m_hat and v_hat by division."""
    return _param_optax(k, _by_divisions)


def _param_optax(k: Kernel, correct: Correction) -> Value:
    ops, fmt = k.ops, _update_format(k)
    first = k.rounded(correct(k, k.new_exp_avg(), 1), "the corrected exp_avg", fmt)
    root = k.rounded(_root_optax(k, correct), "sqrt(exp_avg_sq)")
    divisor = k.rounded(ops.add(root, k.s["epsilon"]), "the denominator")
    update = k.rounded(ops.divide(first, divisor), "the quotient", fmt)
    return _weight_optax(k, update)


def _weight_optax(k: Kernel, update: Value) -> Value:
    ops, fmt = k.ops, _update_format(k)
    if k.step.decay == "decoupled":
        decay = k.rounded(ops.multiply(k.s["l2"], k.x["param"]), "weight_decay * param")
        update = k.rounded(ops.add(update, decay), "the decayed update", fmt)
    update = k.rounded(ops.multiply(k.s["minus_rate"], update), "the scaled update", fmt)
    return k.rounded(ops.add(k.x["param"], update), "the new weight", fmt)


def gradient_optax_compiled(k: Kernel) -> Value:
    """fma(weight_decay, p, g)."""
    g = k.plain_gradient()
    return k.fused(k.s["l2"], k.x["param"], g, "the L2 term") if k.step.decay == "l2" else g


def exp_avg_optax_compiled(k: Kernel) -> Value:
    """fma(1 - beta1, g, beta1*m)."""
    old = k.ops.multiply(k.s["beta1"], k.x["exp_avg"])
    return k.fused(k.s["exp_avg_weight"], k.gradient(), old, "exp_avg")


def exp_avg_sq_optax_compiled(k: Kernel) -> Value:
    """fma(1 - beta2, g^2, beta2*v); with L2 decay fma(beta2, v, (1 - beta2)*g^2)."""
    g, v = k.gradient(), k.x["exp_avg_sq"]
    square, weight, beta2 = k.ops.multiply(g, g), k.s["exp_avg_sq_weight"], k.s["beta2"]
    if k.step.decay == "l2":
        return k.fused(beta2, v, k.ops.multiply(weight, square), "exp_avg_sq")
    return k.fused(weight, square, k.ops.multiply(beta2, v), "exp_avg_sq")


def param_optax_compiled(k: Kernel) -> Value:
    """As `param_optax` with both last sums fused: fma(weight_decay, p, u), then fma(-lr, u, p)."""
    ops, s = k.ops, k.s
    first, root = _by_reciprocals(k, k.new_exp_avg(), 1), _root_optax(k, _by_reciprocals)
    divisor = ops.add(k.rounded(root, "sqrt(exp_avg_sq)"), s["epsilon"])
    divisor = _rounded_within(k, divisor, "the denominator")
    update = ops.divide(first, divisor)
    if k.step.decay == "decoupled" and k.step.storage is FLOAT16:
        decay = k.rounded(ops.multiply(s["l2"], k.x["param"]), "weight_decay * param")
        update = ops.add(update, decay)
    elif k.step.decay == "decoupled":
        update = k.fused(s["l2"], k.x["param"], update, "the decayed update")
    return k.fused(s["minus_rate"], update, k.x["param"], "the new weight")


def param_optax_without_epsilon(k: Kernel) -> Value:
    """As `param_optax` in a compiled step: with an epsilon of 0, m_hat / sqrt(v_hat) is m_hat * (1/sqrt(v_hat))."""
    first = k.rounded(_by_reciprocals(k, k.new_exp_avg(), 1), "the corrected exp_avg")
    return _weight_optax(k, _by_reciprocal(k, first, _root_optax(k, _by_reciprocals)))


def _by_reciprocal(k: Kernel, first: Value, root: Value) -> Value:
    """`m_hat * rsqrt(v_hat)`, the reciprocal root being rounded once."""
    reciprocal = k.rounded(k.ops.divide(np.float32(1), root), "the reciprocal root")
    return k.rounded(k.ops.multiply(first, reciprocal), "the quotient")


def _rounded_within(k: Kernel, value: Value, what: str) -> Value:
    """Round what XLA rounds within a fusion: to float16, not to bfloat16."""
    return k.rounded(value, what) if k.step.storage is FLOAT16 else value


def exp_avg_optax_compiled_mixed(k: Kernel) -> Value:
    """fma(beta1, m, (1 - beta1)*g): a float32 moment of 16-bit gradients."""
    new = k.ops.multiply(k.s["exp_avg_weight"], k.gradient())
    new = _rounded_within(k, new, "(1 - beta1) * grad")
    return k.fused(k.s["beta1"], k.x["exp_avg"], new, "exp_avg")
