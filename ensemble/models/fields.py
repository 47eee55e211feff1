"""Refuse fields of a request that no model reads.

Triton hands a field of a JSON `generate` request that names no input to the models as a parameter of the request, and
so it does with the parameters of other requests. Without a check a misspelt option would have no effect, silently.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from deepseek_triton.ensemble.models.tensors import RequestError, parameters
from deepseek_triton.ensemble.protocol.contract import DESCRIBE_BUILD, STOP_KEY
from deepseek_triton.ensemble.protocol.error_kind import KIND_PARAMETER
from deepseek_triton.ensemble.protocol.request_options import REQUEST_OPTIONS
from deepseek_triton.ensemble.protocol.tensor_spec import TensorSpec

# Parameters of Triton's protocols, which Triton reads itself; so are those that begin with triton_.
TRITON_PARAMETERS = frozenset(
    {"id", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"}
)
OWN_PARAMETERS = frozenset({STOP_KEY, KIND_PARAMETER, DESCRIBE_BUILD})  # which the models read
# Headers that a server may pass on as parameters (--http-header-forward-pattern); so are all names with a hyphen.
HEADERS = frozenset({"authorization", "baggage", "cookie", "host", "traceparent", "tracestate"})
# What Python clients and other servers call an option → its input.
_FIELDS = {option.field: option.tensor_name for option in REQUEST_OPTIONS if option.field} | {"stop": "stop_words"}


def check_fields(request: Any, known: Sequence[TensorSpec]) -> None:
    """Raise `RequestError` for the first parameter of a request that is no input, no header and not Triton's own.

    Args:
        request: a request of Triton's Python backend.
        known: the inputs of the served model; the nearest name is proposed.
    """
    for name in parameters(request):
        if (
            name in TRITON_PARAMETERS | OWN_PARAMETERS
            or name.startswith("triton_")
            or "-" in name
            or name.lower() in HEADERS
        ):
            continue
        names = [spec.name for spec in known]
        if name in names:
            raise RequestError(f"{name} is a parameter of the request, must be an input")
        nearest = [_FIELDS[name]] if _FIELDS.get(name) in names else difflib.get_close_matches(name, names, n=1)
        meant = f"; did you mean {nearest[0]}?" if nearest else ""
        raise RequestError(f"unknown field {name!r}{meant}")
