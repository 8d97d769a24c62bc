"""Problems in which several players each minimise a loss of their own, all stepping at once."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from torch.func import grad_and_value

from metaopt.rule import Params
from metaopt.task import Batch, Task


class Game(Task):
    """A task whose inner step follows every player's own gradient (simultaneous gradient descent).

    ``training_loss`` is the sum over players of their loss with the others' parameters held constant, so its gradient
    is the game's vector field and not the gradient of any function. ``loss`` judges the outcome.
    """

    @abstractmethod
    def players(self, params: Params) -> dict[str, list[str]]:
        """Player -> names of the parameters that it moves; together all of them, each once."""

    @abstractmethod
    def player_losses(self, params: Params, buffers: Params, batch: Batch) -> dict[str, Tensor]:
        """Player -> scalar loss, as functions of all parameters."""

    def loss_and_gradients(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params, Params]:
        """Each player's gradient of its own loss; differentiable in all players' parameters, as `training_loss` is not."""
        gradients: Params = {}
        total = None
        for player, names in self.players(params).items():

            def own_loss(own: Params, player: str = player) -> Tensor:
                return self.player_losses(params | own, buffers, batch)[player]

            own, loss = grad_and_value(own_loss)({name: params[name] for name in names})
            gradients |= own
            total = loss if total is None else total + loss
        assert total is not None, "a game has at least one player"
        return total, {name: gradients[name] for name in params}, buffers

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The sum of the players' losses, each with the other players' parameters detached."""
        total = None
        for player, names in self.players(params).items():
            seen = {name: p if name in names else p.detach() for name, p in params.items()}
            loss = self.player_losses(seen, buffers, batch)[player]
            total = loss if total is None else total + loss
        assert total is not None, "a game has at least one player"
        return total, buffers
