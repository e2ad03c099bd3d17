"""Run in a process without diffvl: loads exported native checkpoints as transformers loads remote code, and answers.

python -I native_client.py IMAGE VIDEO DIR...   -> a JSON line for each directory
"""

import json
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")


def main() -> None:
    import torch  # noqa: PLC0415
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: PLC0415

    torch.set_num_threads(1)  # tiny models: more threads only wait for each other
    image, video, *directories = sys.argv[1:]
    for directory in directories:
        model: Any = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
        content = [{"type": "image", "path": image}, {"type": "text", "text": "What is it?"}]
        chat = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        answer = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        with torch.no_grad():
            logits = model(**{name: value for name, value in inputs.items() if name != "answer_index"}).logits[0, -1]
        facts = {"module": type(model).__module__, "answer": answer.tolist(), "logits": logits[:20].tolist()}
        facts["of_video"] = None
        if processor.video_token is not None:
            chat = [{"role": "user", "content": [{"type": "video", "path": video}, content[1]]}]
            inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
            answer = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
            facts["of_video"] = answer.tolist()
        facts["diffvl"] = "diffvl" in sys.modules
        print(json.dumps(facts))


main()
