"""From prompts to tokens, and from tokens back to text while they are still coming."""

from typing import Any

Tokenizer = Any  # of transformers


def encode(tokenizer: Tokenizer, prompt: str, *, raw: bool = False) -> list[int]:
    """Token ids of a prompt, as the user's turn of a chat if the model has a chat template (never if `raw`)."""
    if tokenizer.chat_template and not raw:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(prompt, add_special_tokens=False).input_ids)
    return list(tokenizer(prompt).input_ids)


class TextStream:
    """Text of a growing list of tokens, piece by piece; all pieces together are the text of the whole list."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._begin = 0  # tokens before it no longer change what follows
        self._shown = 0  # tokens [_begin, _shown) are shown; decoded again, for the spaces between tokens

    def push(self, token: int) -> str:
        """The text that one more token adds: empty while a character's bytes are incomplete."""
        self._tokens.append(token)
        piece = self._unseen()
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._begin, self._shown = self._shown, len(self._tokens)
        return piece

    def flush(self) -> str:
        """What is still held back, at the end."""
        piece = self._unseen()
        self._begin = self._shown = len(self._tokens)
        return piece

    def _unseen(self) -> str:
        seen = self._decode(self._tokens[self._begin : self._shown])
        return self._decode(self._tokens[self._begin :])[len(seen) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
