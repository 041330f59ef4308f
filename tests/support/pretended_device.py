"""Runs code "on a GPU" on a machine without one, and reports what a GPU would refuse.

    with pretend("cuda", capability=(7, 5)) as gpu:  # a T4; (9, 0): an H100; pretend("mps"): a Mac
        model = Model().to("cuda")
        model(torch.randn(1, 80, device="cuda")).cpu().numpy()
    print(gpu.report())

Tensors stay CPU tensors with true numbers, so autograd, optimisers and `.item()` work, and results can be compared with
the CPU's. A tag on the storage of a tensor, which its views share, says where it pretends to be. One mode sees what
Python asks of torch (`.to`, `device=`, `.device`, `.numpy()`), another sees every operator, also those of the backward
pass and of optimisers. A fault is what a real device refuses: an operator on tensors of two devices, `.numpy()` of a
tensor that is not on the CPU, a generator of another device, a forked process; on MPS also float64 and operators
without a kernel. `torch.autocast("cuda")` casts by CUDA's own lists, of torch's header. With `tf32` products and
convolutions round float32 as tensor cores do, where torch lets them. Counted: operators (about the kernels to launch),
waits of the CPU for the device, bytes copied.

Not pretended: memory, speed, other rounding, missing kernels of CUDA, `torch.compile`, several GPUs. A process should
pretend one device only, since code may cache what it found out about it.
"""

import functools
import os
import re
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

TAG, CPU = "_pretended_device", torch.device("cpu")
ANYWHERE = "anywhere"  # made by autograd, which sees no tags
TAKES_SCALARS = {"where", "masked_fill", "fill", "lerp", "index_put", "_index_put_impl", "copy"}  # and pointwise ones
TAKES_CPU_INDICES = {"index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal",
         "repeat_interleave"}  # fmt: skip
PRODUCTS, CONVOLUTIONS = {"mm", "bmm", "addmm", "baddbmm"}, {"convolution", "convolution_backward"}
NOT_ON_MPS = (torch.float64, torch.complex128)
FRIENDS = ("/torch/", "/accelerate/", "/transformers/", "/safetensors/", "/unittest/", "/contextlib.py", "<")


class DeviceFault(RuntimeError):
    """What a real device would have refused."""


def tag_of(tensor):
    """Where a tensor is, or pretends to be: "cpu", "cuda", "mps", "meta" or ANYWHERE."""
    return getattr(tensor.untyped_storage(), TAG, tensor.device.type)


def _tagged(tensor, tag):
    setattr(tensor.untyped_storage(), TAG, tag)
    return tensor


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided]


def _rounded(x):
    """A float32 tensor with the 10 bits of mantissa that tensor cores read; anything else as it is."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        return x
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _shares(tensor, others):
    return any(tensor.untyped_storage()._cdata == other.untyped_storage()._cdata for other in others)


def _where():
    """The innermost line of the code under test."""
    frame = sys._getframe(1)
    while frame and (frame.f_code.co_filename == __file__ or any(f in frame.f_code.co_filename for f in FRIENDS)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})" if frame else "?"


class Pretended:
    """The device that is not there, and what was seen. strict: the first fault is raised, else all are noted."""

    def __init__(self, type, strict):
        self.type, self.strict, self.device = type, strict, torch.device(type, 0)
        self.faults, self.waits, self.copies, self.operators = Counter(), Counter(), Counter(), 0
        self.tf32 = False
        self.around = ["cpu"]  # where the functions under way make new tensors
        self.casts, self.process = {}, os.getpid()  # weights that autocast has cast

    def fault(self, message):
        self.faults[f"{_where()}: {message}"] += 1
        if self.strict:
            raise DeviceFault(f"{_where()}: {message}")

    def forget(self):
        """Start counting anew."""
        self.operators = 0
        for counter in (self.faults, self.waits, self.copies):
            counter.clear()

    def synchronize(self, device=None):
        """Stands for the function of torch.cuda and torch.mps."""
        self.waits[_where()] += 1

    def tag(self, device):
        """The tag for whatever names a device; any but the pretended one, CPU and meta is not there."""
        kind = self.type if isinstance(device, int) else torch.device(device).type
        if kind not in ("cpu", "meta", self.type):
            raise RuntimeError(f"no {kind} here: {self.type} is pretended")
        return kind

    def check(self, func, name, given, tags, args):
        """An operator with a tensor on the device: does it take the others, too?"""
        if os.getpid() != self.process:
            self.fault(f"cannot re-initialize {self.type} in a forked process")
        if self.type == "mps" and not _has_mps_kernel(func):
            self.fault(f"{func} is not implemented for MPS")
        if len(tags) < 2 or name in ("copy", "_to_copy"):
            return
        if name in TAKES_CPU_INDICES and tag_of(args[0]) == self.type:
            given = [(t, tag) for t, tag in given if all(t is not index for index in _tensors(args[1]))]
        scalars = torch.Tag.pointwise in func.tags or name in TAKES_SCALARS
        written = args[0] if func._schema.is_mutable and isinstance(args[0], torch.Tensor) else None
        if any(tag == "cpu" and (t.ndim or not scalars or t is written) for t, tag in given):
            shapes = {tag: [str(tuple(t.shape)) for t, own in given if own == tag] for tag in sorted(tags)}
            found = " and ".join(f"{', '.join(s[:3])}{', …' * (len(s) > 3)} on {tag}" for tag, s in shapes.items())
            self.fault(f"expected all tensors to be on the same device, but found {found} in {func}")

    def rounds(self, name):
        """Whether the inputs of an operator are rounded to TF32 as torch is set now."""
        product = name in PRODUCTS and torch.get_float32_matmul_precision() != "highest"
        return self.tf32 and (product or name in CONVOLUTIONS and torch.backends.cudnn.allow_tf32)

    def report(self, most=8):
        """For people: faults first."""
        lines = [f"{len(self.faults)} faults, {self.operators} operators, {self.waits.total()} waits for the device"]
        lines += [f"  FAULT x{n}  {fault}" for fault, n in self.faults.most_common()]
        lines += [f"  wait x{n}  {where}" for where, n in self.waits.most_common(most) if n]
        return "\n".join([*lines, *(f"  copied {way}: {n / 1e6:.2f} MB" for way, n in self.copies.items())])


class _Operators(TorchDispatchMode):
    """Sees every operator: checks where its tensors are, and tags what comes out."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        gpu, kwargs, name = self.gpu, kwargs or {}, func._schema.name.removeprefix("aten::").rstrip("_")
        given = [(t, tag_of(t)) for t in _tensors((args, kwargs))]
        tags = {tag for _, tag in given if tag != ANYWHERE}
        if gpu.type in tags:
            gpu.check(func, name, given, tags, args)
            if self._waits(name, args):
                gpu.waits[_where()] += 1
            if gpu.rounds(name):
                args = tree_map(_rounded, args)
            gpu.operators += not func.is_view and name not in ("detach", "lift_fresh", "alias")
            tag = gpu.type
        elif given:
            tag = "cpu" if tags else ANYWHERE
        else:  # a new tensor: of the autograd engine, or of the function that Python has called
            tag = ANYWHERE if torch._C._current_graph_task_id() != -1 else gpu.around[-1]
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            if tag != "cpu" and (tag_of(tensor) == ANYWHERE or not _shares(tensor, [t for t, _ in given])):
                _tagged(tensor, tag)
            if gpu.type == "mps" == tag and tensor.dtype in NOT_ON_MPS:
                gpu.fault(f"MPS has no {tensor.dtype}, in {name}")
        return out

    def _waits(self, name, args):
        """Whether the CPU waits for an operator: its result has a size, or is a number, that only the device knows."""
        if name in TAKES_CPU_INDICES and tag_of(args[0]) == self.gpu.type:  # indices of the CPU are copied
            return any(index.dtype == torch.bool or tag_of(index) == "cpu" for index in _tensors(args[1]))
        return name.lstrip("_") in {wait.lstrip("_") for wait in WAITS}


class _Functions(TorchFunctionMode):
    """Sees what Python asks of torch: devices that are asked for or about, and tensors that leave it."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        gpu, kwargs, name = self.gpu, dict(kwargs or {}), getattr(func, "__name__", "")
        own = args[0] if args and isinstance(args[0], torch.Tensor) else None
        asked = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else ""
        if asked in ("device", "is_cuda", "is_mps", "is_cpu"):
            tag = "cpu" if tag_of(own) == ANYWHERE else tag_of(own)
            there = gpu.device if tag == gpu.type else torch.device(tag)
            return there if asked == "device" else asked == f"is_{tag}"
        if name in ("numpy", "__array__") and own is not None and tag_of(own) == gpu.type and not kwargs.get("force"):
            gpu.fault(f"can't convert {gpu.device} device type tensor to numpy, use Tensor.cpu() first")
        if name in ("numpy", "tolist") and own is not None and tag_of(own) == gpu.type:
            gpu.waits[_where()] += 1  # no operator is called
        if name in ("to", "cpu", "cuda") and own is not None:
            return self._moved(name, own, list(args[1:]), kwargs)
        wanted = gpu.tag(kwargs["device"]) if kwargs.get("device") is not None else None
        if kwargs.get("generator") is not None and gpu.type == (wanted or (tag_of(own) if own is not None else "cpu")):
            gpu.fault(f"expected a {gpu.type!r} device type for generator but found 'cpu', in {name}")
        if wanted:
            kwargs["device"] = CPU if wanted != "meta" else wanted
        taken = _tensors((args, kwargs))
        gpu.around.append(wanted or (gpu.type if any(tag_of(t) == gpu.type for t in taken) else "cpu"))
        try:
            out = func(*args, **kwargs)
        finally:
            gpu.around.pop()
        if wanted == gpu.type and name in ("tensor", "as_tensor"):  # from Python's numbers: a copy
            gpu.waits[_where()] += not (args and isinstance(args[0], torch.Tensor) and tag_of(args[0]) == wanted)
        if wanted and isinstance(out, torch.Tensor) and tag_of(out) != wanted:
            out = _tagged(out.detach().clone() if _shares(out, taken) else out, wanted)
        return out

    def _moved(self, name, own, args, kwargs):
        """.to(…), .cpu() and .cuda(): where the device changes, a copy with another tag."""
        gpu, now, other = self.gpu, tag_of(own), args[0] if args and isinstance(args[0], torch.Tensor) else None
        copy, layout = kwargs.pop("copy", False), kwargs.pop("memory_format", torch.preserve_format)
        if other is not None:  # .to(other)
            wanted, dtype, lazy = tag_of(other), other.dtype, kwargs.get("non_blocking", False)
        elif name != "to":
            wanted, dtype, lazy = ("cpu" if name == "cpu" else gpu.tag("cuda")), None, False
        else:
            device, dtype, lazy, _ = torch._C._nn._parse_to(*args[:3], **kwargs)
            wanted = now if device is None else gpu.tag(device)
        if gpu.type == "mps" == wanted and (dtype or own.dtype) in NOT_ON_MPS:
            gpu.fault(f"cannot convert a MPS tensor to {dtype or own.dtype}, which MPS has not")
        if wanted != now:
            gpu.copies[f"{now} -> {wanted}"] += own.numel() * own.element_size()
            gpu.waits[_where()] += not lazy
        there = torch.device("meta") if wanted == "meta" else CPU
        out = own.to(there, dtype or own.dtype, copy=copy or wanted != now, memory_format=layout)
        return _tagged(out, wanted) if wanted != now else out


@contextmanager
def pretend(type="cuda", capability=(9, 0), strict=True, tf32=False):
    """Inside there is one GPU -> Pretended. capability: CUDA's; from (8, 0) on there are tensor cores for bfloat16."""
    gpu, library = Pretended(type, strict), torch.library.Library("aten", "IMPL")
    clone, start, end = torch.UntypedStorage.clone, torch.autocast.__init__, torch.autocast.__exit__
    gpu.tf32, grouped, parsed = tf32, torch._C._group_tensors_by_device_and_dtype, torch._C._nn._parse_to

    def clone_tagged(storage):  # copy.deepcopy of a tensor
        copied = clone(storage)
        setattr(copied, TAG, getattr(storage, TAG, "cpu"))
        return copied

    def parse_to(*args, **kwargs):  # of Module.to; C++ sees no tags
        device, *rest = parsed(*args, **kwargs)
        like = args and isinstance(args[0], torch.Tensor) and tag_of(args[0]) == type
        return gpu.device if like else device, *rest

    def group_by_tag(*args, **kwargs):  # of optimisers and gradient clipping; C++ sees no tags
        groups = grouped(*args, **kwargs)
        tags = [next((tag_of(t) for tensors in held[0] for t in tensors if t is not None), "cpu")
                for held in groups.values()]  # fmt: skip
        return {(gpu.device if tag == type else CPU, dtype): held
                for ((_, dtype), held), tag in zip(groups.items(), tags, strict=True)}  # fmt: skip

    def autocast_on_cpu(self, device_type, *rest, **more):
        start(self, "cpu" if device_type == type else device_type, *rest, **more)

    def autocast_ends(self, *fault):
        found = end(self, *fault)
        if not torch.is_autocast_enabled("cpu"):
            gpu.casts.clear()
        return found

    about = SimpleNamespace(name="pretended", major=capability[0], minor=capability[1], total_memory=16 << 30,
                            multi_processor_count=40)  # fmt: skip
    nothing = dict.fromkeys(("_lazy_init", "set_rng_state", "manual_seed", "manual_seed_all", "set_device",
                             "empty_cache", "reset_peak_memory_stats"))  # fmt: skip
    answers = {**nothing, "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
               "get_device_name": "pretended", "get_device_capability": capability, "get_device_properties": about,
               "get_rng_state": torch.ByteTensor(16), "memory_allocated": 0, "max_memory_allocated": 0}  # fmt: skip
    patches = [(torch.UntypedStorage, "clone", clone_tagged), (torch.autocast, "__init__", autocast_on_cpu),
               (torch.autocast, "__exit__", autocast_ends), (torch._C, grouped.__name__, group_by_tag),
               (torch._C._nn, "_parse_to", parse_to),
               (torch.nn.RNNBase, "flatten_parameters", lambda module: None)]  # fmt: skip
    patches += [(torch.optim.Optimizer, check, lambda optimizer: None) for check in dir(torch.optim.Optimizer)
                if check.endswith("graph_capture_health_check")]  # fmt: skip
    if type == "cuda":
        patches += [(torch.cuda, name, lambda *_, answer=answer, **__: answer) for name, answer in answers.items()]
        patches += [(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or
                     capability >= (8, 0))]  # fmt: skip
        patches += [(torch.cuda, "synchronize", gpu.synchronize)]
        patches += [(torch.accelerator, "is_available", lambda: False)]  # a DataLoader pins no memory
        _autocast_as_cuda(library, gpu.casts, lambda tensor: tag_of(tensor) == type)
    else:
        patches += [(torch.mps, "synchronize", gpu.synchronize)]
        patches += [(torch.backends.mps, name, functools.cache(lambda: True)) for name in ("is_available", "is_built")]
    with ExitStack() as stack:
        for patched in patches:
            stack.enter_context(patch.object(*patched))
        stack.callback(library._destroy)
        stack.enter_context(_Operators(gpu))
        stack.enter_context(_Functions(gpu))
        yield gpu


@contextmanager
def cuda_autocast():
    """Inside the CPU's autocast casts what CUDA's would."""
    library = torch.library.Library("aten", "IMPL")
    _autocast_as_cuda(library, {}, lambda tensor: True)
    try:
        yield
    finally:
        library._destroy()


def _autocast_as_cuda(library, casts, is_there):
    """The CPU's autocast casts what CUDA's would, of the tensors that are there."""
    text = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text().replace("\\\n", "\n")
    policies = {"norm.ScalarOpt_dim": "FP32"}
    for policy in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        listed = re.search(rf"#define AT_FORALL_{policy}\(_\)(.*?)\n\s*\n", text, re.DOTALL)[1]
        found = re.findall(r"_\((\w+)(?:, (\w+))?\)", listed)
        policies |= {f"{name}.{overload or 'default'}": policy for name, overload in found}
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCPU"):
        if name.startswith("aten::"):  # the CPU's own policy
            library.impl(name, torch.library.fallthrough_kernel, "AutocastCPU", allow_override=True)
    for name, policy in policies.items():
        packet, overload = name.split(".")
        operator = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if operator is not None:
            call = _casting(operator, policy, casts, is_there)
            library.impl(name.removesuffix(".default"), call, "AutocastCPU", allow_override=True)


def _casting(operator, policy, casts, is_there):
    """The operator with its tensors cast by one of CUDA's policies. casts: of weights, {id: (weight, its cast)}."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def eligible(t):
        floating = isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return floating and is_there(t)

    def cast(t, dtype):
        if not eligible(t) or t.dtype == dtype:
            return t
        if not (t.is_leaf and t.requires_grad and t.dtype == torch.float32):
            return t.to(dtype)
        if id(t) not in casts:  # a weight is cast once while autocast lasts
            casts[id(t)] = t, t.to(dtype)
        return casts[id(t)][1]

    def call(*args, **kwargs):
        low = torch.get_autocast_dtype("cpu")
        with torch._C._ExcludeDispatchKeyGuard(key):
            if policy == "FP32_SET_OPT_DTYPE":
                wants = eligible(args[0]) and kwargs.get("dtype") is None and args[0].dtype != torch.float32
                return operator(*args, **kwargs | ({"dtype": torch.float32} if wants else {}))
            single = any(t.dtype == torch.float32 for t in _tensors((args, kwargs)))
            dtype = torch.float32 if policy == "FP32" or policy == "PROMOTE" and single else low
            args, kwargs = tree_map(lambda x: cast(x, dtype), (args, kwargs))
            return operator(*args, **kwargs)

    return call


@functools.cache
def _mps_kernels():
    """{operator: whether this torch has it for MPS}, from the list that torch is generated from."""
    import torchgen
    from torchgen.gen import parse_native_yaml
    from torchgen.model import DispatchKey

    folder = Path(torchgen.__file__).parent / "packaged/ATen/native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    has = {str(f.func.name): f.has_composite_kernel or parsed.backend_indices[DispatchKey.MPS].has_kernel(f)
           for f in parsed.native_functions}  # fmt: skip
    return {str(f.func.name): has[str(f.structured_delegate or f.func.name)] for f in parsed.native_functions}


def _has_mps_kernel(func):
    name = func._schema.name.removeprefix("aten::") + f".{func._overloadname}".removesuffix(".default")
    return "_for_cpu" in name or _mps_kernels().get(name, True)  # the CPU has an attention of its own
