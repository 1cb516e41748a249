"""Every private part of torch, transformers and accelerate that the package uses still exists.

A release that moves one fails here with the name of the part, the function of
``xmodal_interp.upstream`` that uses it, and the files that call this function.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, ProcessorMixin
from transformers.generation import continuous_batching
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import xmodal_interp as xi
from tests.helpers.tiny import tiny_vlm
from xmodal_interp import upstream

PACKAGE = Path(xi.__file__).parent
TORCH, TRANSFORMERS, ACCELERATE = "torch 2.14.1", "transformers 5.23.0", "accelerate 1.15.0"

PARTS: dict[str, tuple[str, str, Callable[[], Any]]] = {}
"""By name: the function or constant of ``upstream``, the version it was tested with, and a check
that is True."""


def part(name: str, user: str, version: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def add(check: Callable[[], Any]) -> Callable[[], Any]:
        PARTS[name] = user, version, check
        return check

    return add


@part("torch._native_multi_head_attention", "FUSED_MULTIHEAD", TORCH)
def fused_multihead() -> bool:
    """The kernel of ``nn.MultiheadAttention`` has these parameters, in this order."""
    return given_to(nn.MultiheadAttention(4, 2, batch_first=True), upstream.FUSED_MULTIHEAD) == len(
        upstream.FUSED_MULTIHEAD_PARAMETERS
    )


@part("torch._transformer_encoder_layer_fwd", "FUSED_LAYER", TORCH)
def fused_layer() -> bool:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return given_to(layer, upstream.FUSED_LAYER) == len(upstream.FUSED_LAYER_PARAMETERS)


def given_to(module: nn.Module, function: str) -> int:
    """Return how many arguments a module passes to a function of torch, all by position."""
    found: list[int] = []
    original = getattr(torch, function)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, function, lambda *args: found.append(len(args)) or original(*args))
        x = torch.ones(1, 3, 4)
        module.eval()(*([x] * (3 if isinstance(module, nn.MultiheadAttention) else 1)))
    return found[0]


@part(
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "attention_with_logsumexp",
    TORCH,
)
def logsumexp() -> bool:
    """Operands and mask may have any order in memory, and the mask one entry for all samples."""
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    mask = torch.randn(1, 1, 5, 5)
    right = True
    for operands in ((q, k, v, mask), tuple(t.mT.contiguous().mT for t in (q, k, v, mask))):
        *given, added = operands
        output, found = upstream.attention_with_logsumexp(
            *given, mask=added, causal=False, scaling=0.5
        )
        scores = q @ k.mT * 0.5 + mask
        right &= torch.allclose(output, scores.softmax(-1) @ v, atol=1e-6)
        right &= torch.allclose(found.reshape(2, 2, 5), scores.logsumexp(-1), atol=1e-6)
    return right


@part("nn.Module._call_impl", "FORWARD_FUNCTIONS", TORCH)
def call_impl() -> bool:
    return upstream.FORWARD_FUNCTIONS[1] in vars(nn.Module)


@part("torch._C._current_graph_task_id", "is_recomputing", TORCH)
def recomputing() -> bool:
    found: list[bool] = []

    def doubled(x: torch.Tensor) -> torch.Tensor:
        found.append(upstream.is_recomputing())
        return x * x

    checkpoint(doubled, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    return found == [False, True]


@part("torch._C._functorch.peek_interpreter_stack", "is_in_vmap", TORCH)
def vmap() -> bool:
    found = [upstream.is_in_vmap()]
    torch.func.vmap(lambda x: found.append(upstream.is_in_vmap()) or x)(torch.ones(2))
    return found == [False, True]


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), options=None):
        return function(*args, **(options or {}))


@part(
    "torch.overrides._get_current_function_mode_stack, _pop_mode and _push_mode",
    "remove_function_mode",
    TORCH,
)
def modes() -> bool:
    one, two = Mode(), Mode()
    one.__enter__()
    with two:
        upstream.remove_function_mode(one)
        found = upstream.active_function_modes()
    return found == [two] and upstream.active_function_modes() == []


@part("torch.overrides._pop_mode_temporarily", "restore_popped_mode", TORCH)
def popped() -> bool:
    """A suspended generator puts a mode back at once, and not again when it is released."""
    mode = Mode()
    with mode:
        manager = _pop_mode_temporarily()
        manager.__enter__()
        found = [upstream.active_function_modes()]
        upstream.restore_popped_mode(mode)
        found.append(upstream.active_function_modes())
        del manager
        found.append(upstream.active_function_modes())
    return found == [[], [mode], [mode]]


@part("torch._dynamo.eval_frame.OptimizedModule", "is_optimized_module", TORCH)
def optimized() -> bool:
    module = nn.Linear(2, 2)
    compiled = torch.compile(module, backend="eager")
    return [upstream.is_optimized_module(each) for each in (module, compiled)] == [False, True]


@part("nn.Module._compiled_call_impl", "is_compiled_in_place", TORCH)
def in_place() -> bool:
    module = nn.Linear(2, 2)
    before = upstream.is_compiled_in_place(module)
    module.compile(backend="eager")
    return not before and upstream.is_compiled_in_place(module)


@part("_torchdynamo_orig_callable of functions", "is_compiled_function", TORCH)
def function() -> bool:
    module = nn.Linear(2, 2)
    functions = (
        module.forward,
        torch.compile(module.forward, backend="eager"),
        torch.compiler.disable(module.forward),
    )
    return [upstream.is_compiled_function(each) for each in functions] == [False, True, False]


@part("_is_replica of the copies of nn.DataParallel", "is_replica", TORCH)
def replica() -> bool:
    module = nn.Linear(2, 2)
    return upstream.is_replica(module._replicate_for_data_parallel()) and not upstream.is_replica(
        module
    )


@part("nn.Module._forward_hooks and _forward_pre_hooks", "module_hooks", TORCH)
def hooks() -> bool:
    module = nn.Linear(2, 2)
    with module.register_forward_pre_hook(print), module.register_forward_hook(repr):
        return [hook for _, hook in upstream.module_hooks(module)] == [print, repr]


@part("torch.nn.modules.module._global_forward_hooks", "global_hooks", TORCH)
def hooks_of_all() -> bool:
    with (
        nn.modules.module.register_module_forward_pre_hook(print),
        nn.modules.module.register_module_forward_hook(repr),
    ):
        return upstream.global_hooks() == [("forward_pre_hooks", print), ("forward_hooks", repr)]


@part("nn.Module._modules", "module_tree", TORCH)
def children() -> bool:
    inner = nn.ReLU()
    model = nn.Sequential(inner, nn.Sequential(inner))
    structure = [nn.Sequential, "0", 1, "1", 2, nn.ReLU, nn.Sequential, "0", 1]
    return upstream.module_tree(model) == ([model, inner, model[1]], structure)


@part("nn.Module._parameters", "parameters_of", TORCH)
def parameters() -> bool:
    return list(upstream.parameters_of(nn.Linear(2, 2, bias=False))) == ["weight", "bias"]


@part("nn.Module._buffers", "buffers_of", TORCH)
def buffers() -> bool:
    return "running_mean" in upstream.buffers_of(nn.BatchNorm1d(2))


@part("nn.Module._save_to_state_dict", "extra_state_of", TORCH)
def extra_state() -> bool:
    class Packed(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}packed"] = 3

    found = [upstream.extra_state_of(module) for module in (nn.Linear(2, 2), Packed(2, 2))]
    return found == [{}, {"packed": 3}]


@part("torch._C.DisableTorchFunctionSubclass", "without_tensor_subclasses", TORCH)
def subclasses() -> bool:
    class Refusing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), options=None):
            raise AssertionError

    tensor = torch.ones(2).as_subclass(Refusing)
    with upstream.without_tensor_subclasses():
        return bool(tensor.sum() == 2)


@part("torch.utils._pytree.tree_leaves", "leaves_of", TORCH)
def leaves() -> bool:
    return upstream.leaves_of(({"a": 1}, [2, (3,)])) == [1, 2, 3]


@part("transformers.generation.continuous_batching", "CONTINUOUS_BATCHING", TRANSFORMERS)
def batching() -> bool:
    return upstream.CONTINUOUS_BATCHING in continuous_batching.__name__


@part("_attn_implementation of configurations", "attention_backend", TRANSFORMERS)
def backend() -> bool:
    config = tiny_vlm("llava").model.config
    return (
        upstream.attention_backend(config)
        == "sdpa"
        == upstream.attention_backend(config.text_config)
    )


@part(
    "_attn_implementation_internal of configurations",
    "restore_attention_setting",
    TRANSFORMERS,
)
def setting() -> bool:
    model = tiny_vlm("llava").model
    before = upstream.attention_setting(model.config)
    model.set_attn_implementation("eager")
    changed = upstream.attention_backend(model.config)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        upstream.restore_attention_setting(config, before)
    return changed == "eager" and upstream.attention_backend(model.config) == before


@part("AttentionInterface._global_mapping", "unregister_attention", TRANSFORMERS)
def registry() -> bool:
    AttentionInterface.register("made_up", functional.scaled_dot_product_attention)
    registered = "made_up" in ALL_ATTENTION_FUNCTIONS
    upstream.unregister_attention(AttentionInterface, "made_up")
    return registered and "made_up" not in ALL_ATTENTION_FUNCTIONS


@part("AttentionInterface.get_interface and __getitem__", "none", TRANSFORMERS)
def interface() -> bool:
    """They are public; the tap replaces them on the class, which inherits the second one."""
    own = vars(AttentionInterface)
    return "get_interface" in own and "__getitem__" not in own


@part("_commit_hash of configurations", "commit_of", TRANSFORMERS)
def commit() -> bool:
    return mentioned_in("configuration_utils.py", "_commit_hash")


@part("_tp_size of modules", "tensor_parallel_size", TRANSFORMERS)
def tensor_parallel() -> bool:
    return mentioned_in("integrations/tensor_parallel.py", "_tp_size") or mentioned_in(
        "modeling_utils.py", "_tp_size"
    )


@part("_tokenizer of fast tokenizers", "fast_tokenizer", TRANSFORMERS)
def tokenizer() -> bool:
    return hasattr(upstream.fast_tokenizer(xi.load().tokenizer), "to_str")


@part("_update_model_kwargs_for_generation of models", "grown_argument", TRANSFORMERS)
def grown() -> bool:
    mask = torch.ones(1, 3)
    model = xi.load().model
    return upstream.grown_argument(model, "attention_mask", mask).shape == (1, 4)


@part("_defaults of valid_processor_kwargs", "processor_defaults", TRANSFORMERS)
def defaults_of_a_processor() -> bool:
    kinds = SimpleNamespace(_defaults={"images_kwargs": {"do_resize": False}})
    processor = SimpleNamespace(valid_processor_kwargs=kinds)
    found = upstream.processor_defaults(processor)
    return found is kinds._defaults and hasattr(ProcessorMixin.valid_processor_kwargs, "_defaults")


@part("_hf_hook of modules", "offload_hooks", ACCELERATE)
def offloaded() -> bool:
    module = nn.Linear(2, 2)
    before = upstream.offload_hooks(module)
    cpu_offload(module, torch.device("cpu"))
    hooks = upstream.offload_hooks(module)
    return before == () and any("weight" in (hook.weights_map or {}) for hook in hooks)


@part("_old_forward of modules", "own_forward", ACCELERATE)
def old_forward() -> bool:
    module = nn.Linear(2, 2)
    own = module.forward
    before = upstream.own_forward(module)
    cpu_offload(module, torch.device("cpu"))
    return before is None and upstream.own_forward(module) == own


def mentioned_in(path: str, name: str) -> bool:
    import transformers

    return name in (Path(transformers.__file__).parent / path).read_text()


@pytest.mark.parametrize("name", PARTS)
def test_a_private_part_is_as_it_was(name: str) -> None:
    user, version, check = PARTS[name]
    try:
        unchanged = check()
    except Exception as error:
        raise AssertionError(changed(name, user, version)) from error
    assert unchanged, changed(name, user, version)


def changed(name: str, user: str, version: str) -> str:
    where = ", ".join(users_of(user))
    return f"{name} has changed since {version}: see upstream.{user}, used by {where}"


def users_of(name: str) -> list[str]:
    """Return the files of the package that import a name from ``upstream``."""
    return [path for path, names in imports().items() if name in names]


@functools.cache
def imports() -> dict[str, set[str]]:
    """Return the names that each file imports from ``upstream``."""
    return {
        str(path.relative_to(PACKAGE)): {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "xmodal_interp.upstream"
            for alias in node.names
        }
        for path, tree in files()
    }


@functools.cache
def files() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))]


def test_every_function_of_upstream_is_used_and_tested() -> None:
    tested = {user for user, _, _ in PARTS.values()}
    alike = {  # two functions, or a function and its constants, that use one part
        "active_function_modes": "remove_function_mode",
        "attention_setting": "restore_attention_setting",
        "FUSED_MULTIHEAD_PARAMETERS": "FUSED_MULTIHEAD",
        "FUSED_LAYER_PARAMETERS": "FUSED_LAYER",
        "TOKENIZER_RULES": "fast_tokenizer",
        "MODULE_HOOKS": "module_hooks",
        "GLOBAL_HOOKS": "global_hooks",
    }
    for name, value in vars(upstream).items():
        own = getattr(value, "__module__", upstream.__name__) == upstream.__name__
        if (name.isupper() or callable(value)) and own and not name.startswith("_"):
            assert alike.get(name, name) in tested, name
            assert users_of(name) or name in ("MODULE_HOOKS", "GLOBAL_HOOKS"), name


PROCESSORS = {
    "models/geometry/processor_steps.py": {
        "sys.modules",
        "getattr(getattr(processor, 'valid_processor_kwargs', None), '_defaults', {})",
    },
    "models/geometry/tiles.py": {
        "settings._is_image_too_large",
        "settings._get_grid_layout",
        "processor.image_processor._plan_patches",
        "processor.image_processor._is_extreme_aspect",
    },
}
"""Private methods and settings of processors, and a look-up of functions in their modules. They are
compared with the real processors by ``tests/models``."""


def test_private_parts_are_used_only_in_upstream() -> None:
    found: dict[str, set[str]] = {}
    for path, tree in files():
        private = set(private_uses(tree))
        if private and path.name != "upstream.py":
            found[str(path.relative_to(PACKAGE))] = private
    assert found == PROCESSORS


def private_uses(tree: ast.Module) -> Iterator[str]:
    """Yield private attributes and imports of other packages, and look-ups in ``sys.modules``."""
    own = {"self", "cls"} | {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    methods = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}  # of this file
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_own = isinstance(node.value, ast.Name) and node.value.id in own
            of_own |= node.attr in methods
            if (is_private(node.attr) and not of_own) or ast.unparse(node) == "sys.modules":
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            if any(map(is_private, names)) and not str(node.module).startswith("xmodal_interp"):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            of, name = node.args[:2]
            private = isinstance(name, ast.Constant) and is_private(str(name.value))
            of_own = isinstance(of, ast.Name) and of.id in own
            if private and not of_own:
                yield ast.unparse(node)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_the_look_up_finds_private_uses() -> None:
    written = "import torch\nfrom torch.utils import _pytree\nx._y\ngetattr(x, '_z', 0)\nself._w\n"
    assert list(private_uses(ast.parse(written))) == [
        "from torch.utils import _pytree",
        "x._y",
        "getattr(x, '_z', 0)",
    ]
