"""A model for lmms-eval, which installs it: see `lmms_plugin`."""

import json
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from starflow2_jax.data.sequences import Turn
from starflow2_jax.data.views import Limits, read_picture
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.responder import Responder, Said
from starflow2_jax.sampling.state import check_seed

# Of tasks that say nothing of it.
_MAX_NEW_TOKENS = 1024


class LmmsModel(lmms):
    """Answers chat messages with pictures; nothing is drawn (see `starflow2 sample --format`)."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        path: str | None = None,
        min_pixels: int = Limits.min_pixels,
        max_pixels: int = Limits.max_pixels,
        seed: int = 0,
        devices: int = 1,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Loads a model.

        Args:
            pretrained: a STARFlow2 model or run, or a converted VLM.
            path: "vit" or "latent", see `Responder`.
            min_pixels, max_pixels: of a picture for the tower; a converted VLM has its own.
            seed: of tasks that sample.
            devices: that share out a STARFlow2 model's weights and rows.
            batch_size: requests of a batch.
            max_batch_size, device: the harness's own; JAX places the model.

        Raises:
            UserError: see `Responder`; a path, batch size or seed that is none.
        """
        del max_batch_size, device
        super().__init__()
        if path not in (None, "vit", "latent"):
            raise UserError(f"path is {path!r}, expected vit or latent")
        if not str(batch_size).isdigit() or not int(batch_size):
            raise UserError(f"batch_size is {batch_size!r}, expected a positive number")
        check_seed(int(seed))
        limits = Limits(int(min_pixels), int(max_pixels))
        self.responder = Responder(pretrained, path, limits, devices=int(devices))
        self.batch_size = int(batch_size)
        self._seed = int(seed)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The replies, in the order of the requests."""
        replies: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            settings = request.args[-4]
            groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(n)
        for key, numbers in groups.items():
            for start in range(0, len(numbers), self.batch_size):
                some = numbers[start : start + self.batch_size]
                conversations = [self._conversation(requests[n]) for n in some]
                found = self._answers(conversations, json.loads(key), some)
                for n, reply in zip(some, found, strict=True):
                    replies[n] = reply
                    self.cache_hook.add_partial("generate_until", requests[n].args, reply)
        return [replies[n] for n in range(len(requests))]

    def _answers(
        self, conversations: Sequence[list[Turn]], settings: dict[str, Any], numbers: Sequence[int]
    ) -> list[str]:
        until = settings.get("until") or ()
        temperature = settings.get("temperature")
        samples = settings.get("do_sample", bool(temperature))
        # A task that samples and says no more does so at 1; a temperature of 0 takes the likeliest.
        temperature = 1.0 if temperature is None else float(temperature)
        return self.responder.answers(
            conversations,
            max_new_tokens=int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS),
            temperature=temperature if samples else 0.0,
            top_p=float(settings.get("top_p") or 1.0),
            seed=self._seed,
            # A task that asks the same several times (`repeats`) wants several replies; and those
            # of one batch are not neighbours where tasks of other settings stand between them.
            numbers=numbers,
            stop=(until,) if isinstance(until, str) else tuple(until),
            rows=self.batch_size,
        )

    def _conversation(self, request: Instance) -> list[Turn]:
        # Versions differ in what stands before these.
        to_messages, _, number, task, split = request.args[-5:]
        where = f"{task} {split} {number}"
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number]))
        turns: list[Turn] = []
        system: list[Said] = []
        for message in messages.messages:
            said: list[Said] = []
            for content in message.content:
                if content.type not in ("text", "image"):
                    raise UserError(f"{where}: {content.type} is not read, only text and pictures")
                if content.type == "text":
                    said.append(content.text)
                else:
                    picture = content.url
                    said.append(read_picture(picture) if isinstance(picture, str) else picture)
            if message.role == "system":
                system += said
                continue
            if message.role == "user" and system:
                said, system = [*system, *said], []
            turns.append(self.responder.turn(message.role, said, where))
        return turns

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not built."""
        raise NotImplementedError("tasks of several rounds are not built")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not built: the harness's tasks for models that answer do not ask for it."""
        raise NotImplementedError("log-likelihoods for lmms-eval are not built")
