"""How weights start, in the paper's block and in the modern one (Child et al. 2019, sections 5.2 and 6).

The role of a weight decides how it starts, so the two linear maps with a role of their own have a class of their own:
:class:`ResidualProjection` (its output is added to the residual stream) and :class:`LogitsProjection`.
"""

import math

from torch import nn

from longstride.nn.positions import FactorizedPositions

SCALE = 0.125


class ResidualProjection(nn.Linear):
    """The last linear map of a residual branch: W_p of attention, W_2 of the feed-forward network."""


class LogitsProjection(nn.Linear):
    """The linear map from the last hidden state to the logits."""


def initialize_(module: nn.Module, num_layers: int, scale: float = SCALE) -> None:
    """Draw the module's *own* parameters, not its children's, from the paper's distributions.

    With d the model width, d_in the fan-in and N the number of residual blocks:

    ==============================  ========================================
    token embedding                 N(0, std = scale / sqrt(d))
    position embedding              N(0, std = scale / sqrt(d * number of axes))
    linear map                      N(0, std = scale / sqrt(d_in)), bias 0
    :class:`ResidualProjection`     N(0, std = scale / sqrt(d_in) / sqrt(2 N)), bias 0
    :class:`LogitsProjection`       0
    layer norm, RMS norm            weight 1, bias 0
    ==============================  ========================================

    N blocks add 2 N branches to the stream; the factor 1 / sqrt(2 N) keeps the ratio of embedding to branches
    the same for every depth. Modules without parameters of their own are left alone.

    Args:
        module: any module; call through ``model.apply`` or from ``PreTrainedModel._init_weights``.
        num_layers: N, the number of residual blocks.
        scale: 0.125 in the paper.

    Source: Child, Gray, Radford, Sutskever 2019, section 5.2 (the factor) and section 6 (the distributions).
    """
    if isinstance(module, LogitsProjection):
        nn.init.zeros_(module.weight)
    elif isinstance(module, nn.Linear):
        std = scale / math.sqrt(module.in_features)
        if isinstance(module, ResidualProjection):
            std /= math.sqrt(2 * num_layers)
        nn.init.normal_(module.weight, std=std)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=scale / math.sqrt(module.embedding_dim))
    elif isinstance(module, FactorizedPositions):
        nn.init.normal_(module.weight, std=scale / math.sqrt(module.hidden_size * len(module.axes)))
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        nn.init.ones_(module.weight)
    bias = getattr(module, "bias", None)
    if isinstance(module, (nn.Linear, nn.LayerNorm)) and bias is not None:
        nn.init.zeros_(bias)
