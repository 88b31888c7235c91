"""GRPO in ms-swift with this package's ops, as a plugin that its command line imports.

    pip install ms-swift liger-kernel vcr1_fast
    swift rlhf --rlhf_type grpo --external_plugins examples/ms_swift_plugin.py \
        --use_liger_kernel true --model Qwen/Qwen2.5-7B-Instruct --dataset ... --reward_funcs ...

`--use_liger_kernel true` takes the fused head and loss, here ours; without it the log-probs and the
entropy are ours.
"""

from vcr1_fast.integrations.liger import patch_liger
from vcr1_fast.integrations.ms_swift import patch_ms_swift

patch_ms_swift()
patch_liger("fused_linear")
