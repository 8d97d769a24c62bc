"""The fixed parts of an exported file: the optimizer classes, around what is printed or copied of a rule."""

from __future__ import annotations

CHECK = '''
def _check(values):
    """Refuse hyperparameters outside their domains."""
    for name, (count, allows, domain) in _DOMAINS.items():
        numbers = values[name] if isinstance(values[name], (tuple, list)) else (values[name],)
        if len(numbers) != count or not all(math.isfinite(x) and allows(x) for x in numbers):
            raise ValueError(f"{name} must be {domain}, got {values[name]!r}")
'''

ADD_PARAM_GROUP = '''
    def add_param_group(self, param_group):
        """As in torch; the hyperparameters of the group must lie in their domains."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if any(param.is_complex() for param in self.param_groups[-1]["params"]):
            raise ValueError("complex parameters are not supported; give torch.view_as_real(p) its own parameter")
'''

LOAD_STATE_DICT = '''
    def load_state_dict(self, state_dict):
        """As in torch, but state keeps its dtype: torch would round the float32 state of bf16 parameters."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, param in zip(ids, params):
            for slot, value in state_dict["state"].get(i, {}).items():
                if slot != "step" and torch.is_tensor(value):
                    self.state[param][slot] = value.detach().to(param.device, copy=True)
'''

ELEMENTWISE_STEP = '''
    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param, group):
        dtype = torch.float32 if param.dtype in (torch.bfloat16, torch.float16) else param.dtype
        state = self.state[param]
        wide, grad = param.to(dtype), param.grad.to(dtype)
        if not state:
            state["step"] = 0
{init}
        state["step"] = int(state["step"]) + 1
{call}
        param.copy_(new)
'''

TREE_STEP = '''
    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have gradients; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for name in _DOMAINS:
            if any(other[name] != group[name] for other in self.param_groups):
                raise ValueError(f"{{name}} acts on all parameters together, so its param groups must agree")
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if params:
            self._update(params, group)
        return loss

    def _update(self, params, group):
        dtype = functools.reduce(torch.promote_types, (param.dtype for param in params), torch.float32)
        states = [self.state[param] for param in params]
        for param, state in zip(params, states):
            if not state:
                own = param.to(torch.promote_types(param.dtype, torch.float32))
                state["step"] = 0
{init}
        t = 1 + max(int(state["step"]) for state in states)
        wide, grad = _Tree(param.to(dtype) for param in params), _Tree(param.grad.to(dtype) for param in params)
{slots}
{call}
        for i, (param, state) in enumerate(zip(params, states)):
            state["step"] = int(state["step"]) + 1
{store}
            param.copy_(new.leaves[i])
'''

TREE = '''
class _Tree:
    """A value for each tensor: operators and torch functions act on each by itself, with numbers that serve all."""

    def __init__(self, leaves):
        self.leaves = list(leaves)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return _each(function, *args, **(kwargs or {}))

    def __neg__(self):
        return _each(operator.neg, self)

    def clone(self):
        return _each(torch.clone, self)

    def mean(self):
        return _each(torch.mean, self)

    def to(self, dtype):
        return _each(lambda leaf: leaf.to(dtype), self)

    @property
    def dtype(self):
        return self.leaves[0].dtype


def _each(function, *args, **kwargs):
    count = next(len(arg.leaves) for arg in args if isinstance(arg, _Tree))
    columns = [arg.leaves if isinstance(arg, _Tree) else [arg] * count for arg in args]
    return _Tree(function(*column, **kwargs) for column in zip(*columns))


for _name in ("add", "sub", "mul", "truediv", "pow", "gt", "lt", "ge", "le", "ne"):
    _operation = getattr(operator, _name)
    setattr(_Tree, f"__{_name}__", lambda x, y, operation=_operation: _each(operation, x, y))
    setattr(_Tree, f"__r{_name}__", lambda x, y, operation=_operation: _each(operation, y, x))


def global_sum(x):
    """The sum over all elements of all tensors."""
    return sum(leaf.sum() for leaf in x.leaves)


def global_norm(x):
    """The Euclidean norm over all elements of all tensors."""
    return torch.sqrt(global_sum(x * x))
'''

RULE_STEP = '''
    @torch.no_grad()
    def step(self, closure=None{loss_argument}):
        """One update of every parameter that has a gradient; returns what the closure returns.{loss_doc}"""
{evaluation}        params, hp, roles, count = {{}}, {{}}, {{}}, 0
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                name = group["param_names"][i] if "param_names" in group else f"parameter_{{count}}"
                count += 1
                if param.grad is not None:
                    params[name] = param
                    hp[name] = {{key: _number(group[key]) for key in _DOMAINS}}
                    if "role" in group:
                        roles[name] = group["role"]
        if params:
            shared = len(self.param_groups) == 1
            self._update(params, hp[name] if shared else PerParameter(hp), roles{update_arguments})
        return {returned}

    def _update(self, params, hp, roles{update_arguments}):
        wide = {{name: param.detach().to(compute_dtype(param.dtype), copy=True) for name, param in params.items()}}
        grads = {{name: param.grad.to(wide[name].dtype, copy=True) for name, param in params.items()}}
        info = infer_info(params, roles)
{rule}
        state = {{}}
        for name, param in params.items():
            kept = self.state[param]
            if not kept:
                kept.update(rule.init({{name: wide[name]}}, info)[name], step=0)
            state[name] = {{**kept, "step": torch.tensor(int(kept["step"]), device=param.device)}}
        ctx = Context({context})
        new_params, new_state = rule.update(grads, state, wide, hp, ctx)
        for name, param in params.items():
            param.copy_(new_params[name])
            step = int(self.state[param]["step"]) + 1
            self.state[param].update(new_state[name], step=step)
'''

CLOSURE_AT = '''
    def _closure_at(self, params, closure):
        """``evaluate(elsewhere) -> (loss, gradients)``; the parameters are put back afterwards."""

        def evaluate(elsewhere):
            saved = {name: param.detach().clone() for name, param in params.items()}
            try:
                for name, param in params.items():
                    param.copy_(elsewhere[name])
                with torch.enable_grad():
                    loss = closure()
                grads = {}
                for name, param in params.items():
                    dtype = compute_dtype(param.dtype)
                    grad = torch.zeros_like(param) if param.grad is None else param.grad
                    grads[name] = grad.to(dtype, copy=True)
            finally:
                for name, param in params.items():
                    param.copy_(saved[name])
            return torch.as_tensor(loss).detach(), grads

        return evaluate
'''

NUMBER = """
def _number(value):
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else float(value)
"""

LOAD_INLINE = '''
@functools.cache
def _all_tensors(device):
    """The learned numbers of this file: float32, little-endian, base64, one tensor after another."""
    data = base64.b64decode(_NUMBERS)
    numbers = torch.tensor(struct.unpack(f"<{len(data) // 4}f", data))
    sizes = [math.prod(shape) for shape in _SHAPES.values()]
    pieces = torch.split(numbers, sizes)
    return {name: piece.reshape(shape).to(device) for (name, shape), piece in zip(_SHAPES.items(), pieces)}
'''

LOAD_FILE = '''
@functools.cache
def _all_tensors(device):
    """The learned numbers, from the file beside this one."""
    path = pathlib.Path(__file__).with_name("{file}")
    return torch.load(path, map_location=device, weights_only=True)
'''

LOAD_TENSORS = '''
def load_tensors(label, device):
    """The learned tensors of one part of the rule."""
    tensors = _all_tensors(device)
    return {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(f"{label}/")}
'''

SMOKE = """
if __name__ == "__main__":  # a smoke test
    x = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 12).reshape(3, 4))
    optimizer = {name}([x]{arguments})

    def closure():
        optimizer.zero_grad()
        loss = (x**2).mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    print(f"loss {{losses[0]:.4g}} -> {{losses[-1]:.4g}} in 20 steps")
"""
