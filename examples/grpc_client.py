"""Questions to a server, several users at the same time: `python examples/grpc_client.py HOST:PORT VIDEO QUESTION...`.

Start a server with `sparsevila serve`. The video is uploaded and prefilled once, whoever asks; importing this imports no torch.
"""

import asyncio
import sys

from sparsevila_cluster.client import AsyncClient


async def ask(target: str, video: str, question: str) -> str:
    """One user with a connection of its own."""
    async with AsyncClient.connect(target) as client:
        media = await client.prepare(video)
        chat = client.conversation(media)
        answer = await chat.ask(question, max_tokens=64)
        return f"{question} {answer.text}   (first token after {answer.timeline['ttft']:.0f} ms, prefix reused: {media.reused})"


async def main(target: str, video: str, questions: list[str]) -> None:
    """All users at once."""
    for line in await asyncio.gather(*(ask(target, video, question) for question in questions)):
        print(line)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
