"""What is said when an application of Ray Serve does not start."""

from rayrlhf.serving.listening import reasons

TRACEBACK = """The deployment failed to start 3 times in a row. Error:
Traceback (most recent call last):
  File "policy.py", line 38, in __init__
pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, max_model_len (512) is greater than 128.
    For further information visit https://errors.pydantic.dev/2.14/v/value_error

"""


def test_the_reason_is_the_last_line_that_says_something() -> None:
    said = reasons({"front": "", "ppo-0": TRACEBACK, "sft-0": "no CPU is free"})
    assert said == (
        "ppo-0: Value error, max_model_len (512) is greater than 128.; sft-0: no CPU is free"
    )
