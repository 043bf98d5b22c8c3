"""Three hundred random operations while workers fall and rise: no wrong token, no byte lost. The long one is a command."""

from tests.chaos.storm import Storm

NUM_OPERATIONS = 300


def test_a_storm_leaves_no_wrong_token_and_no_byte_behind(runner, world, note):
    cluster, *clips = world

    async def main():
        told = await Storm(cluster, clips, seed=1).run(NUM_OPERATIONS)
        assert told["ask"] > NUM_OPERATIONS // 10 and told["kill"] and told["stop"]
        note(f"storm of {NUM_OPERATIONS}", ", ".join(f"{name} {num}" for name, num in sorted(told.items())))

    runner.run(main())
