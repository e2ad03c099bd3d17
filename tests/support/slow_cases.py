"""Cases that `make test-slow` runs and `make test` does not: the dearest of one run (`pytest --durations=150`, two cores of an
AMD EPYC, 2026-11-29). Most are one more architecture or way of what stays by default. Four are not, and only the slow run proves
them: the plan of a model in parts, the plan without a connection, the control that differs by its objective alone, and the run
that answering does not change."""

# By the end of their names.
SLOW_CASES = (
    "estimate/test_memory.py::test_the_plan_is_within_its_margin[checkpointed, LoRA]",
    "estimate/test_memory.py::test_the_plan_is_within_its_margin[in parts over two]",
    "estimate/test_outlook.py::test_what_nothing_makes_fit",
    "estimate/test_outlook.py::test_steps_and_tokens_are_those_of_training[qwen2_5_vl]",
    "estimate/test_outlook.py::test_steps_and_tokens_are_those_of_training[qwen3_moe]",
    "conversion/test_outlook.py::test_a_plan_needs_neither_checkpoint_nor_data",
    "compare/test_control.py::test_the_control_differs_by_its_objective_alone_and_a_page_compares_both",
    "train/test_answers_during.py::test_answering_changes_nothing_of_a_run",
    "conversion/test_vlm.py::test_a_checkpoint_loads_and_answers_without_diffvl",
    "export/test_way_back.py::test_the_released_template_gives_way_to_that_of_training",
    "hub/test_static.py::test_two_forms_are_compiled_and_no_more[llama-causal-same]",
    "hub/test_static.py::test_buffers_belong_to_their_trunk",
    "hub/test_static.py::test_a_step_does_not_wait_for_the_device[gemma2-block-same-True]",
    "hub/test_static.py::test_a_step_does_not_wait_for_the_device[gemma2-causal-shift-False]",
    "hub/test_valueless.py::test_a_block_needs_no_values[gemma2-causal-shift-False]",
    "hub/test_valueless.py::test_a_block_needs_no_values[gemma2-block-same-True]",
    "hub/test_valueless.py::test_a_block_needs_no_values[llama-block-shift-False]",
    "gates/test_training_runs.py::test_a_resumed_run_is_the_uninterrupted_one_in_every_family[gemma2]",
    "gates/test_training_runs.py::test_accumulation_changes_nothing_in_any_family[gemma2]",
    "gates/test_training_runs.py::test_accumulation_changes_nothing_in_any_family[gpt2]",
    "conversion/test_kill.py::test_a_killed_run_goes_on_as_if_nothing_had_been[lora-step]",
    "conversion/test_kill.py::test_what_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays[nan gradient]",
    "train/test_curriculum.py::test_eight_rows_at_once_are_eight_rows_one_by_one",
    "data/test_left_out.py::test_two_processes_leave_out_the_same",
    "conversion/test_dllm_route.py::test_prepare_align_diffuse_generate[Dream]",
    "conversion/test_bad_data.py::test_a_bad_image_of_a_large_set_stops_the_run_at_its_step_and_it_can_go_on[1]",
    "train/test_feed.py::test_a_stream_goes_on_exactly[workers, packed]",
    "decode/test_harmless_answers.py::test_convert_and_evaluate[ascii]",
    "train/test_sharding.py::test_what_is_gathered_is_what_a_whole_model_writes[lora]",
    "gates/test_native.py::test_a_bf16_source[gemma3]",
    "conversion/test_start.py::test_a_stage_loads_its_model_and_measures_its_data_once[1]",
)
