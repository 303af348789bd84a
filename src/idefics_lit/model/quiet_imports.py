"""bitsandbytes and peft, imported without the message that bitsandbytes logs on some CPUs.

It reports an optional kernel for inference, which has no gradient and isn't used (see `idefics_lit.model.loading`).
peft imports bitsandbytes, so both are imported here.
"""

import logging

_logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
_was_disabled, _logger.disabled = _logger.disabled, True
try:
    import bitsandbytes
    import peft
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
finally:
    _logger.disabled = _was_disabled

__all__ = ["Linear4bit", "Params4bit", "bitsandbytes", "peft"]
