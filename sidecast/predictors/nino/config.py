"""The hyper-parameters of NiNo and WNN+ networks, and the weights that they imply."""

from __future__ import annotations

from dataclasses import dataclass

from sidecast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NinoConfig:
    """Hyper-parameters of a NiNo network (or, with ``gnn=False``, of a WNN+ network). Defaults are the published ones.

    Attributes:
        gnn: Message passing over the neural graph; without it every scalar parameter is predicted by itself (WNN+).
        context_len: c, the states that the network reads.
        max_horizon: K, the largest horizon in snapshot intervals; the network predicts all of 1..K.
        hidden_dim: D.
        num_layers: M, message-passing layers (``gnn`` only).
        max_kernel_elements: Largest kernel of a convolution that fits on one edge (``gnn`` only).
        lpe_dim: Laplacian eigenvectors on each node (``gnn`` only).
        num_edge_types: Rows of the edge-type embedding.
        num_mlp_layers: Linear layers of the network for one parameter (WNN+ only).

    Source: NiNo (arXiv 2409.04434), section 4 and appendix A; WNN+ is the ablation without a graph.
    """

    gnn: bool = True
    context_len: int = 5
    max_horizon: int = 40
    hidden_dim: int = 128
    num_layers: int = 3
    max_kernel_elements: int = 9
    lpe_dim: int = 8
    num_edge_types: int = 15
    num_mlp_layers: int = 4

    def __post_init__(self) -> None:
        least = {"context_len": 2, "num_layers": 1, "num_mlp_layers": 2, "num_edge_types": 14}
        for name, value in vars(self).items():
            if name != "gnn" and (not isinstance(value, int) or value < least.get(name, 1)):
                raise ConfigError(f"{name} is {value!r}; it must be an integer of at least {least.get(name, 1)}")

    @property
    def feature_dim(self) -> int:
        """Input columns of the edge projection: kernel elements x context, or the context alone for WNN+."""
        return self.context_len * (self.max_kernel_elements if self.gnn else 1)

    @property
    def num_outputs(self) -> int:
        """Rows of the last layer, kernel-element-major: row ``f * max_horizon + k - 1``."""
        return self.max_horizon * (self.max_kernel_elements if self.gnn else 1)

    def check_horizon(self, predictor: str, horizon_intervals: int) -> None:
        """Raises ConfigError if the network has no output for the horizon."""
        if not 1 <= horizon_intervals <= self.max_horizon:
            raise ConfigError(
                f"horizon is {horizon_intervals}; predictor {predictor!r} has outputs for 1 to {self.max_horizon} "
                "snapshot intervals"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the network, as in published checkpoints."""
        dim = self.hidden_dim
        shapes: dict[str, tuple[int, ...]] = {"layer_embed.weight": (self.num_edge_types, dim)}

        def linear(name: str, outputs: int, inputs: int) -> None:
            shapes[f"{name}.weight"] = (outputs, inputs)
            shapes[f"{name}.bias"] = (outputs,)

        linear("edge_proj.fc.0", dim, self.feature_dim)
        if not self.gnn:
            for layer in range(self.num_mlp_layers - 1):
                linear(f"edge_mlp.fc.{2 * layer}", dim, dim)
            linear(f"edge_mlp.fc.{2 * self.num_mlp_layers - 2}", self.num_outputs, dim)
            return shapes
        linear("node_proj.fc.0", dim, self.lpe_dim)
        linear("edge_out.fc.0", dim, dim)
        linear("edge_out.fc.2", self.num_outputs, dim)
        for layer in range(self.num_layers):
            linear(f"gnn.convs.{layer}.edge_encoder", 2 * dim, dim)
            linear(f"gnn.convs.{layer}.pre_nns.0.0", dim, 2 * dim)
            linear(f"gnn.convs.{layer}.post_nns.0.0", dim, 2 * dim)
            linear(f"gnn.convs.{layer}.lin", dim, dim)
            if layer < self.num_layers - 1:
                for name in ("lin_e", "lin_s", "lin_t", "lin1"):
                    linear(f"gnn.edge_update.{layer}.{name}", dim, dim)
        return shapes
