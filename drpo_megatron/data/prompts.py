"""Tokenized prompts in a deterministic order that can be resumed."""

from __future__ import annotations

import random
from typing import Any

from drpo_megatron.config.schema import DataConfig
from drpo_megatron.data.errors import DataError
from drpo_megatron.data.rows import Message, Row, Rows, open_rows
from drpo_megatron.records import Prompt

# Generated sources cannot be checked whole; this many rows, spread over the source, are checked before training.
GENERATED_ROWS_CHECKED = 16


class PromptSource:
    """An endless stream of prompts: epoch after epoch, each in an order of its own that the seed fixes.

    Raises DataError from `next` when a generated row is malformed or too long (rows of files are checked beforehand).
    """

    def __init__(self, config: DataConfig, rows: Rows, tokenizer: Any, seed: int) -> None:
        self._config, self._rows, self._tokenizer, self._seed = config, rows, tokenizer, seed
        self._epoch = 0
        self._index = 0
        self._order = self._epoch_order(0)

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self._rows)

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts. The last ones of an epoch and the first ones of the following can be in one call."""
        return [prompt for _, prompt in self.take(n)]

    def take(self, n: int) -> list[tuple[int, Prompt]]:
        """The same with each one's number in the whole stream, for `at`."""
        taken = []
        for _ in range(n):
            if self._index == len(self._rows):
                self._epoch, self._index = self._epoch + 1, 0
                self._order = self._epoch_order(self._epoch)
            number = self._epoch * len(self._rows) + self._index
            taken.append((number, self.prompt(self._order[self._index])))
            self._index += 1
        return taken

    def at(self, number: int) -> Prompt:
        """Prompt `number` of the stream, again."""
        epoch, index = divmod(number, len(self._rows))
        return self.prompt((self._order if epoch == self._epoch else self._epoch_order(epoch))[index])

    def state(self) -> dict[str, int]:
        """The position, for a checkpoint: `epoch` and `index` of the next prompt, `rows` and `seed` they count in."""
        return {"epoch": self._epoch, "index": self._index, "rows": len(self._rows), "seed": self._seed}

    def restore(self, state: dict[str, int]) -> None:
        """Continue where `state()` was taken. Raises DataError when the number of rows or the seed differs."""
        for key, now in (("rows", len(self._rows)), ("seed", self._seed)):
            if state[key] != now:
                raise DataError(
                    f"the checkpoint's data had {key} = {state[key]}, now it is {now}; resume with the same data"
                )
        self._epoch, self._index = state["epoch"], state["index"]
        self._order = self._epoch_order(self._epoch)

    def prompt(self, index: int) -> Prompt:
        """Row `index` as the policy sees it. Raises DataError when it is too long or does not suit the settings."""
        row = self._rows[index]
        text = self._render(row)
        # The chat template already holds the special tokens; plain text gets the tokenizer's own (a leading BOS).
        ids = self._tokenizer(text, add_special_tokens=not self._config.chat_template)["input_ids"]
        if not ids:
            raise DataError(f"{row.where}: the prompt has no tokens")
        if len(ids) > self._config.max_prompt_tokens:
            raise DataError(
                f"{row.where}: the prompt has {len(ids)} tokens, data.max_prompt_tokens is "
                f"{self._config.max_prompt_tokens}; raise it or remove the row"
            )
        return Prompt(id=row.id, token_ids=list(ids), text=text, answer=row.answer, metadata=row.metadata)

    def _render(self, row: Row) -> str:
        template = self._config.prompt_template
        if isinstance(row.prompt, str):
            text = template.replace("{prompt}", row.prompt)
            if not self._config.chat_template:
                return text
            messages: list[Message] = [{"role": "user", "content": text}]
        elif not self._config.chat_template:
            raise DataError(f"{row.where}: is a list of chat messages; set data.chat_template=true")
        else:
            *earlier, last = row.prompt
            messages = [*earlier, {**last, "content": template.replace("{prompt}", last["content"])}]
        if self._config.system_prompt is not None:
            if messages[0]["role"] == "system":
                raise DataError(f"{row.where}: has a system message of its own; set data.system_prompt=null")
            messages = [{"role": "system", "content": self._config.system_prompt}, *messages]
        try:
            return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # the template is a program of the model's author (jinja2's errors, or its own)
            raise DataError(f"{row.where}: the chat template refuses it ({type(error).__name__}: {error})") from error

    def _epoch_order(self, epoch: int) -> list[int]:
        order = list(range(len(self._rows)))
        if self._config.shuffle:
            random.Random(f"{self._seed}:{epoch}").shuffle(order)
        return order


def load_prompts(config: DataConfig, tokenizer: Any, seed: int) -> PromptSource:
    """Open the data source and check it: all rows of a file, 16 rows of a generated source.

    tokenizer: a `transformers` tokenizer. Raises DataError for malformed rows (file, line, reason), for a prompt above
    max_prompt_tokens, and for a tokenizer without the chat template that the configuration asks for.
    """
    if config.chat_template and not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; set data.chat_template=false or use a model that has one")
    if config.system_prompt is not None and not config.chat_template:
        raise DataError("data.system_prompt needs data.chat_template; put the text into data.prompt_template instead")
    rows = open_rows(config.source)
    source = PromptSource(config, rows, tokenizer, seed)
    step = 1 if rows.stored else max(1, len(rows) // GENERATED_ROWS_CHECKED)
    problems = []
    for index in range(0, len(rows), step):
        try:
            source.prompt(index)
        except DataError as error:
            problems.append(str(error))
    if problems:
        more = f"\n... and {len(problems) - 10} more rows" if len(problems) > 10 else ""
        raise DataError("\n".join(problems[:10]) + more)
    return source
