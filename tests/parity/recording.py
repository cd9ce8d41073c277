"""The incumbent's answers in a file: JSON lines, one a request."""

import json
from pathlib import Path

from tests.parity.case import Case
from tests.parity.client import Answer


class Recording:
    """Answers by configuration and request."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str], tuple[str, Answer]] = {}

    @classmethod
    def load(cls, path: Path) -> "Recording":
        made = cls()
        for line in path.read_text().splitlines():
            row = json.loads(line)
            made._answers[row["configuration"], row["name"]] = (row["digest"], row["answer"])
        return made

    def save(self, path: Path) -> None:
        rows = [
            {"configuration": configuration, "name": name, "digest": digest, "answer": answer}
            for (configuration, name), (digest, answer) in self._answers.items()
        ]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def add(self, configuration: str, case: Case, answer: Answer) -> None:
        self._answers[configuration, case.name] = (case.digest, answer)

    def answer(self, configuration: str, case: Case) -> Answer | None:
        """None when the request was not recorded, or when it was another one."""
        digest, answer = self._answers.get((configuration, case.name), ("", {}))
        return answer if digest == case.digest else None
