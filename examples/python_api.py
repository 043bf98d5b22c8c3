"""Questions about one video in this process: `python examples/python_api.py [VIDEO] [MODEL]`.

Without arguments it films a video of the demo world and asks the bundled model.
"""

import sys
import tempfile
from pathlib import Path

from sparsevila_cluster import VideoQA


def demo_video(folder: str) -> Path:
    """An MP4 file of the demo world, which the bundled model has never seen."""
    from sparsevila_cluster.demo.drawing import write_mp4
    from sparsevila_cluster.demo.scene_drawing import make_video

    path = Path(folder) / "clip.mp4"
    write_mp4(make_video(1)[1], path)
    return path


def main(arguments: list[str]) -> None:
    """Prepare once, ask twice: the second question sees the first one and its answer."""
    with tempfile.TemporaryDirectory() as folder:
        video, model = [*arguments, *(None, None)[len(arguments) :]]
        with VideoQA(model or "demo") as qa:
            media = qa.prepare(video or demo_video(folder), max_frames=64)
            print(f"{media.visual_tokens} visual tokens, {media.visual_tokens_kept} kept, {media.kv_bytes} bytes of KV")
            chat = qa.conversation(media)
            for question in ("What colour is the heart at step 5?", "Where is the cyan heart?"):
                answer = chat.ask(question, max_tokens=32)
                print(f"{question} {answer.text}   (looked at {answer.evidence.places(2)})")


if __name__ == "__main__":
    main(sys.argv[1:])
