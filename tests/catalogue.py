"""The fault catalogue: ways in which data, files, machines and people break a run, and what shows that this kit holds.

Each id has a title and either tests ("module::function") or a sentence that says why there is none. `NOT_YET` is a debt, counted aloud.
"""

from typing import NamedTuple

NOT_YET = "NOT YET"


class Fault(NamedTuple):
    title: str
    tests: tuple[str, ...] = ()
    why: str = ""  # there is no test: the reason, or NOT_YET


def tested(title: str, *tests: str) -> Fault:
    return Fault(title, tests)


def untested(title: str, why: str = NOT_YET) -> Fault:
    return Fault(title, (), why)


FILE, RECORD, PICTURE, PLACE = (
    f"test_catalogue_data::test_{name}"
    for name in ("a_file_of_records", "a_record", "a_picture", "what_is_no_plain_file_is_refused_and_not_opened")
)
REL = "test_reliability::test_"

CATALOGUE: dict[int, Fault] = {
    # records, the file
    1: tested("file missing", FILE),
    2: tested(
        "truncated JSON",
        FILE,
        "test_store::test_errors_of_a_damaged_list_are_placed_as_the_standard_library_places_them",
    ),
    3: tested("top level not a list", FILE, "test_catalogue_data::test_lines_and_a_byte_order_mark_are_read"),
    4: tested("empty list", FILE),
    5: tested("not UTF-8, BOM, UTF-16", FILE, "test_catalogue_data::test_lines_and_a_byte_order_mark_are_read"),
    6: tested("Git-LFS pointer or web page", FILE),
    7: tested("duplicate keys", RECORD),
    8: tested("nesting, huge numbers", FILE, RECORD),
    9: tested(
        "file larger than memory",
        "test_store::test_both_readers_give_the_records_of_a_list",
        "test_store::test_another_process_gets_a_path_and_not_the_records",
    ),
    10: tested("duplicate ids", RECORD),
    11: tested(
        "file changed between run and resume",
        "test_reliability::test_other_words_of_the_same_length_in_the_records_are_refused",
    ),
    12: tested(
        "another file of the same name on another node", "test_watchdog::test_ranks_with_other_records_are_refused"
    ),
    # records, one by one
    **{
        k: tested(title, RECORD)
        for k, title in {
            13: "record not an object",
            14: "no conversations",
            15: "conversations null or text",
            16: "conversations empty",
            17: "turn without value or from",
            18: "value null, number, list",
            19: "empty answer",
            20: "empty question",
            21: "white answer",
            22: "roles user, assistant",
            23: "role system: the first turn is the record's own system prompt",
            24: "role Human, trailing space",
            25: "two questions in a row",
            27: "picture in a first answer",
            28: "only answers",
            30: "only questions",
            31: "picture without <image>",
            32: "<image> without a picture: bad, it may have lost it",
            33: "<image> twice in a turn: bad, kind mark",
            34: "<image> in two turns",
            35: "<image> in an answer",
            36: "image is a list, null, empty, a number: a list of one is taken, null and empty are text only",
            43: "NUL",
            44: "half a character",
            45: "bidi controls, private use",
            46: "CRLF, spaces",
            47: "long question with a picture",
            48: "long question",
            49: "answer cut",
            50: "features push text out",
            51: "extra keys",
        }.items()
    },
    26: tested(
        "begins with an answer", RECORD, "test_doctor::test_a_run_that_is_told_what_the_doctor_found_leaves_it_out"
    ),
    29: tested("ends with a question", RECORD),
    **{
        k: tested(
            title,
            RECORD,
            "test_text::test_text_never_becomes_a_special_token",
            "test_text::test_the_learned_tokens_are_the_answers_and_their_ends",
        )
        for k, title in {
            37: "</s> in a question",
            38: "</s> in an answer",
            39: "<s>",
            40: "<unk>",
            41: "ASSISTANT: inside a turn",
            42: "other templates' words",
        }.items()
    },
    52: untested(
        "prompt injection, personal data", "What a text says is the data's owner's to judge; a format check cannot."
    ),
    # pictures
    53: tested("missing", RECORD, "test_doctor::test_a_sound_set_ends_with_0_and_a_bad_one_with_2_and_every_finding"),
    56: tested("truncated", PICTURE, "test_doctor::test_a_run_that_is_told_what_the_doctor_found_leaves_it_out"),
    57: untested(
        "flipped bits inside a JPEG",
        "It decodes to some other picture; without a list of the pictures' hashes, which LLaVA's data does not come with, nobody can tell.",
    ),
    **{
        k: tested(title, PICTURE)
        for k, title in {
            54: "GIF named .jpg",
            55: "zero bytes",
            58: "text, web page, LFS pointer",
            59: "SVG",
            60: "EPS",
            61: "AVIF, HEIC, TIFF, PSD, JPEG 2000",
            62: "CMYK",
            63: "palette with transparency",
            66: "grey, one bit",
            67: "animation",
            69: "1 x 1",
            70: "a few pixels",
            72: "169 million pixels",
            73: "header of 60,000 x 60,000",
            74: "text bomb, large file",
        }.items()
    },
    64: tested(
        "transparent", PICTURE, "test_catalogue_data::test_16_bits_keep_their_range_and_alpha_is_the_references"
    ),
    65: tested(
        "16 bits, I, F", PICTURE, "test_catalogue_data::test_16_bits_keep_their_range_and_alpha_is_the_references"
    ),
    68: tested("EXIF rotation", PICTURE, "test_records::test_exif_is_applied_only_if_asked"),
    71: tested(
        "20,000 x 1",
        PICTURE,
        "test_doctor::test_a_picture_that_would_take_gigabytes_is_refused_before_it_is_decoded",
        "test_fuzz::test_no_picture_takes_more_than_256_mb",
    ),
    75: tested("../", RECORD, "test_records::test_every_problem_is_named_and_nothing_is_lost"),
    76: tested("absolute path", RECORD),
    77: tested("link that leads out", PLACE),
    78: tested("dangling link, loop", PLACE),
    79: tested("folder, pipe, device, socket", PLACE),
    80: tested("URL, data:", RECORD),
    81: tested(
        "NUL, backslash, space, case, normal form", RECORD, "test_catalogue_data::test_a_path_in_another_normal_form"
    ),
    82: tested("permission denied", "test_catalogue_data::test_a_picture_that_may_not_be_read"),
    83: tested(
        "file system stalls or errs in mid-run",
        "test_watchdog::test_a_read_that_fails_for_a_moment_is_tried_again_and_then_named",
        "test_watchdog::test_a_read_that_does_not_end_is_named",
        "test_watchdog::test_a_read_that_does_not_end_on_one_of_two_ranks_is_the_cause",
    ),
    84: untested(
        "picture replaced during the run",
        "A picture is read when its record's turn comes, and is what it is then; stamps of 300,000 files at every start would cost more than they tell. The feature cache, which outlives a run, does keep stamps.",
    ),
    85: tested(
        "another image processor",
        "test_parity_text::test_pixels",
        "test_records::test_pixels_are_the_processors_own",
        "test_features::test_another_tower_layer_processor_or_padding_has_a_cache_of_its_own",
    ),
    # tokenizer and template
    86: tested("no padding token", "test_catalogue_data::test_the_padding_token_does_not_matter"),
    87: tested("no unk token", "test_catalogue_data::test_the_padding_token_does_not_matter"),
    88: tested("padding token ends texts", "test_catalogue_data::test_the_padding_token_does_not_matter"),
    89: tested(
        "legacy, one token of drift",
        "test_text::test_the_learned_tokens_are_the_answers_and_their_ends",
        "test_catalogue_data::test_a_template_that_would_learn_something_else",
    ),
    90: tested("another model's template", "test_catalogue_data::test_a_template_that_would_learn_something_else"),
    91: tested(
        "model_max_length 1e30 or tiny",
        "test_doctor::test_tokenizer_template_and_length_are_tried_before_records_are_read",
    ),
    92: tested(
        "length so short that labels go",
        RECORD,
        "test_doctor::test_tokenizer_template_and_length_are_tried_before_records_are_read",
    ),
    93: tested("vocabulary larger than the embedding", "test_catalogue_data::test_a_tokenizer_that_is_not_the_models"),
    94: tested("tokens added to the tokenizer alone", "test_catalogue_data::test_a_tokenizer_that_is_not_the_models"),
    95: tested(
        "template or length changed",
        REL + "going_on_with_something_else_is_refused_with_the_difference",
        "test_store::test_a_conversion_is_used_again_exactly_as_long_as_nothing_changed",
    ),
    96: tested(
        "template from an untrusted place", "test_catalogue_data::test_a_template_that_reaches_for_more_than_text"
    ),
    # model, projector, checkpoint
    97: tested("projector's shapes", "test_model::test_projector_round_trip_and_refusal_with_both_shapes"),
    98: tested("projector's keys", "test_model::test_projector_round_trip_and_refusal_with_both_shapes"),
    99: tested("projector never loaded", "test_train::test_a_wrong_configuration_is_one_line_and_exit_2"),
    100: tested(
        "weights that are not there", "test_model::test_weights_that_are_not_there_are_refused_and_not_made_up"
    ),
    101: tested(
        "pickle in .bin",
        "test_secure::test_a_pickle_in_a_model_folder_runs_nowhere",
        "test_secure::test_a_pickle_as_a_projector_runs_nowhere",
        "test_secure::test_convert_runs_no_pickle",
    ),
    102: tested("truncated safetensors", "test_secure::test_a_damaged_shard_is_named_in_one_line"),
    103: tested(
        "bit rot in the safetensors of a checkpoint or result",
        "test_reliability::test_every_changed_byte_and_every_missing_file_of_a_sealed_checkpoint_is_found",
        "test_storage::test_verify_says_what_is_whole_and_what_is_not",
    ),
    104: tested("hostile config.json", "test_secure::test_a_configuration_that_names_code_is_refused_by_every_reader"),
    105: tested("moving revision of a hub id", "test_secure::test_a_hub_id_is_one_revision_told_or_pinned"),
    106: tested(
        "index names a shard outside the folder",
        "test_secure::test_an_index_names_files_beside_it",
        "test_secure::test_nothing_outside_a_model_folder_is_opened",
    ),
    107: tested(
        "stage 1 interrupted", "test_state::test_two_ranks_then_one_then_two_are_the_run_that_was_never_stopped"
    ),
    108: tested(
        "newest checkpoint half written",
        REL + "the_newest_sound_checkpoint_is_taken_and_the_others_are_set_aside_by_name",
    ),
    109: tested(
        "newest checkpoint damaged",
        REL + "every_changed_byte_and_every_missing_file_of_a_sealed_checkpoint_is_found",
        REL + "the_newest_sound_checkpoint_is_taken_and_the_others_are_set_aside_by_name",
    ),
    110: tested("no sound checkpoint", REL + "a_run_never_starts_over_by_itself"),
    111: tested(
        "optimizer or generator file missing",
        REL + "every_changed_byte_and_every_missing_file_of_a_sealed_checkpoint_is_found",
    ),
    112: tested(
        "another number of ranks",
        "test_state::test_two_ranks_then_one_then_two_are_the_run_that_was_never_stopped",
        "test_state::test_a_global_batch_that_changes_is_refused_with_the_flag_that_keeps_it",
    ),
    113: tested("other settings on resume", REL + "going_on_with_something_else_is_refused_with_the_difference"),
    114: tested(
        "disk full while saving",
        "test_storage::test_a_save_that_fails_removes_its_rubbish_raises_an_alarm_and_training_goes_on",
        "test_storage::test_a_run_that_would_fill_its_disk_is_refused",
        "test_storage::test_a_rank_that_cannot_write_stops_no_other",
    ),
    115: tested(
        "quota, read-only, permission at a save",
        "test_storage::test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_read",
        "test_storage::test_after_three_failures_in_a_row_a_run_ends_cleanly_and_goes_on_when_there_is_room",
    ),
    116: tested("SIGKILL at any instant", REL + "killed_at_random_instants_a_run_ends_as_if_nothing_had_been"),
    117: tested(
        "SIGTERM, SIGINT, SIGUSR1",
        REL + "a_signal_ends_a_run_after_its_step_and_the_same_command_goes_on",
        REL + "a_signal_to_one_rank_stops_both_and_the_run_goes_on_as_if_nothing_had_been",
    ),
    118: tested("a second signal", REL + "a_signal_ends_a_run_after_its_step_and_the_same_command_goes_on"),
    119: tested("power loss", "test_storage::test_files_are_durable_before_the_manifest_says_so_and_their_folders_too"),
    120: tested(
        "two jobs in one folder", "test_storage::test_a_second_run_in_one_folder_is_refused_and_told_who_holds_it"
    ),
    121: tested(
        "save_total_limit 1",
        REL + "rotation_keeps_two_sealed_ones_at_least",
        REL + "a_run_keeps_as_many_sealed_checkpoints_as_it_is_told",
    ),
    122: tested(
        "somebody else's checkpoint",
        "test_secure::test_a_pickle_in_a_checkpoint_runs_nowhere",
        "test_state::test_every_file_that_a_run_leaves_is_safetensors_json_or_text",
    ),
    123: tested(
        "final export interrupted",
        "test_storage::test_killed_at_one_point_after_another_a_run_ends_as_if_nothing_had_been",
        "test_storage::test_a_result_that_cannot_be_written_is_no_success",
    ),
    172: tested(
        "weights that the model has no place for",
        "test_families::test_weights_that_a_model_has_no_place_for_are_refused",
        "test_families::test_a_language_model_with_more_than_its_class_has_is_refused",
    ),
    173: tested(
        "another architecture as the model, language model or tower",
        "test_families::test_any_other_model_is_refused_by_name_wherever_it_is_given",
    ),
    174: tested(
        "language model that LLaVA's frame changes",
        "test_families::test_a_model_that_the_frame_would_change_is_refused_by_name",
        "test_families::test_a_setting_that_the_frame_loses_is_named",
    ),
    175: tested(
        "sliding windows",
        "test_families::test_a_packed_row_says_what_the_model_says_of_each_record_alone",
        "test_families::test_chat_reads_the_same_with_its_cache_and_without",
        "test_kernels::test_a_kernel_that_forgets_the_window_is_caught",
    ),
    176: tested(
        "tower without class token, with registers, or of no square",
        "test_families::test_the_strategy_follows_from_the_tower",
        "test_families::test_a_tower_that_llava_cannot_read_is_refused_by_name",
    ),
    177: tested(
        "image processor that is not the tower's", "test_families::test_a_processor_that_is_not_the_towers_is_refused"
    ),
    178: tested(
        "float16 loses the loss's gradient", "test_model::test_float16_gradients_do_not_underflow_before_the_loss_scale"
    ),
    # the loop and the ranks
    124: tested("gradient not finite", REL + "a_gradient_that_is_not_finite_stops_all_ranks_before_the_weights_change"),
    125: tested(
        "micro-batch with nothing to learn",
        RECORD,
        "test_fuzz::test_a_mutated_record_is_taken_whole_or_refused_with_a_reason",
    ),
    126: tested(
        "one rank without a picture",
        "test_ranks::test_zero3_equals_one_process",
        "test_ranks::test_the_small_run_holds_every_case",
        "test_ranks::test_steps_of_one_modality_without_the_tower_and_recomputation_change_nothing_under_zero3",
    ),
    127: tested("one modality, remainders", "test_sampler::test_remainders", "test_sampler::test_every_index_once"),
    128: tested(
        "ranks draw different orders",
        "test_sampler::test_global_batches_do_not_depend_on_the_world_size",
        "test_sampler::test_a_plan_leaves_the_global_generators_alone",
    ),
    129: tested("loader's worker dies", "test_watchdog::test_a_worker_that_ended_is_named_with_its_records"),
    130: tested(
        "loader's worker hangs", "test_watchdog::test_a_stopped_worker_is_named_with_the_records_that_do_not_come"
    ),
    131: tested(
        "a rank dies or stalls",
        "test_watchdog::test_a_stopped_rank_ends_both_with_the_stacks_of_both",
        "test_watchdog::test_a_killed_rank_ends_the_other",
    ),
    132: tested(
        "out of memory on a long batch",
        "test_watchdog::test_memory_that_is_full_is_said_with_the_row",
        "test_watchdog::test_a_preflight_changes_nothing",
    ),
    133: untested(
        "machine not fit: GPU, driver, port, disk",
        "A broken card or driver cannot be brought about here. Each rank prints its device, free memory, free disk and versions before the model is read, other versions on another rank are refused (safe/12_ranks), room on the disk is 114, a port that is taken cannot meet a launcher that asks the system for a free one.",
    ),
    134: tested("loss runs away", "test_watchdog::test_a_loss_that_jumps_raises_an_alarm_once_and_changes_nothing"),
    # notebook, chat
    135: untested(
        "kernel dies, training with it",
        "Training is a command of its own (train.py, or the launcher); the notebooks train nothing longer than a minute, so there is no job to lose.",
    ),
    136: tested("cell run twice", "test_storage::test_a_second_run_in_one_folder_is_refused_and_told_who_holds_it"),
    137: tested("kernel interrupted", REL + "a_signal_ends_a_run_after_its_step_and_the_same_command_goes_on"),
    138: untested(
        "CUDA started, then forked",
        "Ranks are started by the launcher as processes of their own and conversions by spawn; nothing forks after CUDA is up, and no CPU machine can show it.",
    ),
    139: tested(
        "paths and tokens in outputs", "test_sync::test_no_file_names_a_machine", "test_sync::test_notebooks_are_clean"
    ),
    140: tested("question without a picture, or two", "test_chat::test_questions_that_cannot_be_asked"),
    141: tested(
        "question longer than the context",
        "test_chat::test_an_answer_ends_where_the_context_does",
        "test_chat::test_questions_that_cannot_be_asked",
    ),
    142: tested("template guessed from a name", "test_chat::test_missing_picture_and_templates"),
    143: untested(
        "LoRA without its base",
        "There is no LoRA; the flag is refused (test_config::test_a_flag_that_asks_for_another_training_is_refused).",
    ),
    144: tested("URL given to the chat", "test_secure::test_a_picture_is_a_path_never_an_address"),
    145: tested("bomb given to the chat", "test_chat::test_a_picture_that_would_take_gigabytes_is_refused"),
    146: untested(
        "demo server exposed",
        "There is no demonstration server in the kit: the chat is a function and a command of the terminal, and listens on no port.",
    ),
    147: tested("answer without end", "test_chat::test_an_answer_ends_where_the_context_does"),
    148: tested("logits not finite", "test_chat::test_damaged_weights_are_named"),
    # the run's folder, its checkpoints and its processes, once more
    149: tested(
        "a disk that is just large enough, and a kill",
        "test_storage::test_a_run_that_fitted_its_disk_goes_on_after_a_kill_at_any_point",
        "test_storage::test_the_remedy_for_a_full_disk_is_one_that_changes_something",
    ),
    150: tested(
        "disk full when all steps are done",
        "test_storage::test_when_all_steps_are_done_room_is_asked_for_the_result_alone_and_then_for_nothing",
    ),
    151: tested(
        "links in a run's folder",
        "test_storage::test_nothing_is_written_through_a_link_in_a_runs_folder",
        "test_storage::test_a_link_where_a_run_would_fill_a_folder_is_refused_with_a_remedy",
        "test_storage::test_an_output_folder_may_itself_be_a_link",
    ),
    152: tested(
        "folder removed, moved or replaced under a run",
        "test_storage::test_a_folder_that_is_lost_under_a_run_is_noticed_at_the_next_save_and_another_runs_is_left_alone",
        "test_storage::test_a_folder_that_is_lost_is_noticed_at_the_end",
    ),
    153: tested(
        "files of another step in a checkpoint, sealed again",
        REL + "what_was_changed_and_sealed_again_is_told_in_one_line_and_the_one_before_is_resumed",
        REL + "a_run_whose_newest_checkpoint_was_mixed_goes_on_from_the_one_before",
    ),
    154: tested(
        "run.json or manifest of another shape", REL + "a_damaged_note_of_a_run_and_an_odd_manifest_are_no_traceback"
    ),
    155: tested(
        "kill -9 of the command that was typed",
        "test_watchdog::test_kill_9_of_the_command_that_was_typed_ends_all_ranks_and_their_workers",
        "test_watchdog::test_kill_9_of_the_launcher_of_one_process_ends_it_too",
        "test_watchdog::test_a_second_launcher_that_was_left_alone_before_its_ranks_began_is_noticed",
    ),
    156: tested(
        "the shell that started a run ends", "test_watchdog::test_a_shell_that_ends_before_its_run_is_no_launcher"
    ),
    157: tested(
        "--restarts -1, --ranks -3, flags with a slip",
        "test_watchdog::test_a_wish_that_no_launcher_can_meet_is_refused_in_one_line",
        "test_watchdog::test_a_flag_that_nobody_knows_is_refused_by_the_launcher_too",
    ),
    # what is not read, and what people write
    158: tested(
        "a comma too many, comments, Python's quotes, records behind each other",
        FILE,
        "test_catalogue_data::test_lines_and_a_byte_order_mark_are_read",
    ),
    159: tested(
        "zeros, archives, a record without an end",
        FILE,
        "test_store::test_a_file_without_an_end_of_a_record_is_refused_in_bounded_memory",
    ),
    160: tested("an image under another key, in a turn, several", RECORD),
    161: tested("videos and sounds", RECORD),
    162: tested("marks of other formats", RECORD),
    163: tested("messages, instruction, content parts", RECORD),
    164: tested("weights, tools, a system prompt as a key", RECORD),
    165: tested("a value of megabytes", RECORD),
    166: tested("nesting that a deeper call cannot read", RECORD),
    167: tested("an image behind model_max_length", RECORD),
    168: tested(
        "a conversion that a power cut left damaged",
        "test_store::test_a_damaged_conversion_is_made_again_and_said_so",
        "test_store::test_a_conversion_is_on_the_disk_before_its_mark",
        "test_store::test_parts_that_a_stop_left_damaged_are_made_anew",
    ),
    169: tested(
        "kill -9 of a conversion", "test_store::test_workers_of_a_conversion_end_with_the_process_that_was_killed"
    ),
    170: tested(
        "a text that the tokenizer fails on",
        "test_store::test_a_text_that_the_tokenizer_fails_on_is_that_records_finding",
    ),
    171: tested(
        "a million keys, 100,000 turns", "test_store::test_a_record_of_a_million_keys_or_turns_is_read_in_bounded_time"
    ),
    # settings and engines
    179: tested(
        "training arguments that are taken and ignored",
        "test_inherited::test_a_field_that_is_taken_acts",
        "test_inherited::test_a_field_that_does_not_act_is_refused_when_it_is_set_and_taken_when_it_is_not",
        "test_inherited::test_every_field_is_on_one_list",
    ),
    180: tested(
        "evaluation loss that depends on batch size or ranks",
        "test_evaluation::test_the_loss_is_the_same_for_any_batch_size_and_number_of_ranks",
    ),
    181: tested(
        "the best checkpoint is not what a run leaves",
        "test_evaluation::test_the_best_checkpoint_is_the_result_and_is_kept",
        "test_evaluation::test_a_save_that_failed_is_not_the_best",
    ),
    182: tested(
        "DeepSpeed is not installed",
        "test_accumulation::test_without_deepspeed_a_run_on_one_rank_trains",
        "test_accumulation::test_without_deepspeed_zero_is_one_line",
    ),
    183: tested(
        "gradients that depend on how a step is cut, or lose what they add",
        "test_accumulation::test_gradient_norms_are_the_same_for_any_cut_of_a_step",
        "test_accumulation::test_gradients_of_16_bits_add_up_better_in_float32",
    ),
    184: tested(
        "a DeepSpeed file that contradicts the settings",
        "test_settings::test_a_deepspeed_file_may_repeat_the_settings_and_not_contradict_them",
        "test_field::test_what_the_field_met",
    ),
    185: tested(
        "a Parquet file from the hub that holds its images",
        "test_unpacked::test_training_from_parquet_is_training_from_a_folder",
        "test_unpacked::test_bytes_paths_and_text_may_be_mixed",
        "test_unpacked::test_every_column_of_one_image_is_read",
        "test_unpacked::test_a_bad_image_is_its_records_finding_in_all_three",
        "test_unpacked::test_memory_is_bounded_by_a_row_group",
        "test_unpacked::test_what_was_unpacked_is_used_again_and_made_anew_when_it_is_not_whole",
        "test_unpacked::test_a_damaged_file_is_named_in_one_line",
        "test_unpacked::test_a_disk_that_is_full_is_said_before_and_while_unpacking",
    ),
    186: tested(
        "a data file given twice, or gone, among several",
        "test_store::test_a_file_given_twice_and_all_that_are_missing_are_refused_by_name",
        "test_field::test_all_files_that_are_missing_are_named",
    ),
    187: tested("tar shards or no data among several data files", "test_field::test_what_the_field_met"),
    188: tested(
        "several files in another order at a resume",
        "test_field::test_several_files_are_one_set_of_records_for_a_run_and_its_resume",
    ),
    # what doctor, dry run, run and chat say
    189: tested(
        "a folder that is no model: another format, adapter, GGUF, quantised, cache, stage 1",
        "test_verdicts::test_a_folder_that_is_no_model",
        "test_verdicts::test_chat_says_of_a_wrong_folder_what_training_says",
    ),
    190: tested(
        "a part in another's place",
        "test_verdicts::test_a_part_in_another_place_or_a_setting_that_does_not_fit",
        "test_verdicts::test_chat_with_another_kind_of_model_is_one_line",
    ),
    191: tested(
        "doctor, dry run and run disagree",
        "test_field::test_what_the_field_met",
        "test_verdicts::test_several_problems_are_told_together_by_all_three",
        RECORD,
        FILE,
        PICTURE,
    ),
    192: tested(
        "tokenizer without the template's end token",
        "test_text::test_v1_ends_in_the_tokenizers_own_end_token",
        "test_verdicts::test_a_model_without_the_templates_end_token",
    ),
    193: tested(
        "every bad record and picture in one data set, and the page of it",
        "test_doctor::test_everything_bad_at_once_is_found_and_shown_safely",
    ),
}
