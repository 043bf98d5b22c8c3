"""Many conversations at once, each media prefilled once: `python examples/many_questions.py`."""

import asyncio
import tempfile
from pathlib import Path

from sparsevila_cluster import AsyncVideoQA
from sparsevila_cluster.demo.drawing import write_mp4
from sparsevila_cluster.demo.questions import make_questions
from sparsevila_cluster.demo.scene_drawing import make_video

NUM_VIDEOS = 3


async def main() -> None:
    """Every question of the demo world is marked by what the world says."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        items, truths = [], []
        for seed in range(1, NUM_VIDEOS + 1):
            scene, frames = make_video(seed)
            path = Path(folder) / f"{seed}.mp4"
            write_mp4(frames, path)
            questions = make_questions(scene, np.random.default_rng(seed), 4)
            items.append((path, [question.text for question in questions]))
            truths += [question.answer for question in questions]
        async with AsyncVideoQA("demo") as qa:
            results = await qa.ask_many(items, max_tokens=64)
        told = [answer.text.strip() for result in results for answer in result.answers]
        right = sum(answer == truth for answer, truth in zip(told, truths, strict=True))
        print(f"{right} of {len(truths)} answers about {NUM_VIDEOS} videos are right")


if __name__ == "__main__":
    asyncio.run(main())
