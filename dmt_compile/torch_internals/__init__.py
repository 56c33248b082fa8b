"""Every private API of PyTorch that dmt_compile touches, and nothing else.

PyTorch moves these between minor versions; the rest of the package calls the names defined here. Tried on 2.11 to 2.13.
"""

from torch._C._distributed_c10d import Store
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.exc import ShortenTraceback
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dmt_compile.torch_internals.collectives import (
    all_gather_single,
    default_store,
)
from dmt_compile.torch_internals.dense_compilers import (
    aot_module,
    compile_with_inductor,
)
from dmt_compile.torch_internals.dynamo import (
    calling_modules,
    drop_unused_sizes,
    ends_in_graph_break,
    guard_identity,
    input_value,
    is_frame_input,
    mark_before_tracing,
    mark_dynamic_dims,
    marked_dims,
    restart_analysis,
    source_modules,
    source_of,
    source_text,
    take_back_marks,
    trace_by_rule,
    unlimited_recompiles,
    variable_name,
)
from dmt_compile.torch_internals.sizes import (
    canonical_expression,
    drop_needless_guards,
    fake_mode,
    fresh_size,
    is_fake,
    size_from_expression,
    sizes_are_settled,
)
from dmt_compile.torch_internals.training import (
    backward_pass,
    has_gradient_hooks,
    has_step_hooks,
    in_backward_node,
    in_backward_optimizers,
    swap_contents,
    swap_in_backward,
    will_run,
    written,
)

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "ShortenTraceback",
    "Store",
    "all_gather_single",
    "aot_module",
    "backward_pass",
    "calling_modules",
    "canonical_expression",
    "compile_with_inductor",
    "default_store",
    "drop_needless_guards",
    "drop_unused_sizes",
    "enable_python_dispatcher",
    "ends_in_graph_break",
    "fake_mode",
    "fresh_size",
    "guard_identity",
    "has_gradient_hooks",
    "has_step_hooks",
    "in_backward_node",
    "in_backward_optimizers",
    "input_value",
    "is_fake",
    "is_frame_input",
    "mark_before_tracing",
    "mark_dynamic_dims",
    "marked_dims",
    "restart_analysis",
    "size_from_expression",
    "sizes_are_settled",
    "source_modules",
    "source_of",
    "source_text",
    "swap_contents",
    "swap_in_backward",
    "take_back_marks",
    "trace_by_rule",
    "unlimited_recompiles",
    "variable_name",
    "will_run",
    "written",
]
