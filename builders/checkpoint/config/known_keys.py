"""Tables of the keys of a checkpoint's configuration: which are read, which change nothing here, which are refused.

A key that is in no table is one that no code here knows: `unknown_keys` names it, and the build warns of it. The tables
hold what transformers' configuration classes accept, what published checkpoints carry, and the keys of GGUF. They say
nothing about values that are read: hf_config.py, gguf_metadata.py and the tokenizer's readers check those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deepseek_triton.builders.errors import UnsupportedError


def words(text: str) -> frozenset[str]:
    """The words of `text`."""
    return frozenset(text.split())


@dataclass(frozen=True)
class KnownKeys:
    """The keys that one file may have.

    read: the code here reads them. unused: whatever they say, the model computes the same here. neutral: key → the
    values with which it changes nothing; any other value is refused. prefixes: of keys that are all unused.
    """

    read: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()

    def unknown_keys(self, values: Mapping[str, Any]) -> list[str]:
        """The keys of `values` that are in no table; a key without a value (null) says nothing."""
        known = self.read | self.unused | self.neutral.keys()
        return [
            key
            for key, value in values.items()
            if value is not None and key not in known and not key.startswith(self.prefixes)
        ]

    def refuse(self, values: Mapping[str, Any], file: str) -> None:
        """Refuse a key whose value would change what the model computes.

        Raises:
            UnsupportedError: names the key, its value, and the values that are supported.
        """
        for key, allowed in self.neutral.items():
            value = values.get(key)
            if value is not None and value not in allowed:
                supported = " or ".join(_spelled(one) for one in allowed) or "a file without it"
                raise UnsupportedError(f"{file} has {key} {value!r}: not supported (supported: {supported})")


def describe_unknown(file: str, keys: Iterable[str]) -> tuple[str, ...]:
    """The warning about keys of `file` that are in no table; none where there are no such keys."""
    names = ", ".join(keys)
    return (f"warning: {file} has keys that are not known here and have no effect: {names}",) if names else ()


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


OFF: tuple[Any, ...] = (False,)

# config.json: keys that a transformers configuration of any kind may have.
_ANY_CONFIG_UNUSED = words(
    "_name_or_path name_or_path transformers_version torch_dtype dtype bos_token_id pad_token_id unk_token_id "
    "sep_token_id decoder_start_token_id use_cache initializer_range initializer_std return_dict output_attentions "
    "output_hidden_states chunk_size_feed_forward id2label label2id num_labels problem_type tokenizer_class "
    "task_specific_params finetuning_task torchscript tf_legacy_loss use_bfloat16 prefix tie_encoder_decoder "
    "cross_attention_hidden_size attn_implementation _attn_implementation _attn_implementation_autoset "
    "_attn_implementation_internal _flash_attn_2_enabled _experts_implementation experts_implementation "
    "use_flash_attention use_flash_attention_2 use_flash_attn gradient_checkpointing "
    # what a training left there
    "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout_prob "
    "unsloth_version unsloth_fixed unsloth_training_args model_max_length is_llama_config transformers.js_config "
    # decoding, which older files keep here
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens"
)
_ANY_CONFIG_READ = words(
    "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act rms_norm_eps max_position_embeddings tie_word_embeddings eos_token_id "
    "rope_theta rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings "
    "use_sliding_window layer_types quantization_config compression_config"
)
_ANY_CONFIG_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": OFF, "add_cross_attention": OFF, "use_mrope": OFF, "rope_interleaved": OFF,
    "pruned_heads": ({},), "per_layer_config": ({},), "is_causal": (True,), "use_bidirectional_attention": OFF,
}  # fmt: skip
_LATENT_READ = words(
    "attention_bias q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts "
    "num_experts_per_tok moe_intermediate_size n_shared_experts first_k_dense_replace moe_layer_freq scoring_func "
    "topk_method norm_topk_prob n_group topk_group routed_scaling_factor num_nextn_predict_layers num_mtp_layers"
)
_LATENT_UNUSED = words(
    "pretraining_tp aux_loss_alpha seq_aux ep_size router_aux_loss_coef output_router_logits qk_head_dim auto_map"
)
# model_type → the keys that this architecture reads, and those that it has and that change nothing.
_ARCHITECTURE_READ: dict[str, frozenset[str]] = {
    "llama": words("attention_bias mlp_bias"),
    "qwen2": words("sliding_window max_window_layers"),
    "qwen3": words("attention_bias sliding_window max_window_layers"),
    "deepseek_v2": _LATENT_READ,
    "deepseek_v3": _LATENT_READ | {"rope_interleave"},
    "deepseek_v32": _LATENT_READ | words("index_n_heads index_head_dim index_topk mlp_layer_types"),
}
_ARCHITECTURE_UNUSED: dict[str, frozenset[str]] = {
    "llama": words("pretraining_tp"),  # how the products were cut; the same sums
    "qwen2": words("attention_bias"),  # q, k and v always have one, the output has none
    "deepseek_v2": _LATENT_UNUSED,
    "deepseek_v3": _LATENT_UNUSED,
    "deepseek_v32": _LATENT_UNUSED,
}
_ARCHITECTURE_NEUTRAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v2": {"mlp_bias": OFF},
    "deepseek_v32": {"mlp_bias": OFF, "rope_interleave": (True,)},
}

_GENERATION_READ = words("eos_token_id temperature top_k top_p min_p repetition_penalty do_sample")
GENERATION_KEYS = KnownKeys(
    read=_GENERATION_READ,
    unused=words(
        "_from_model_config bos_token_id pad_token_id decoder_start_token_id transformers_version use_cache "
        "cache_implementation cache_config max_cache_len return_dict_in_generate output_attentions "
        "output_hidden_states output_scores output_logits max_length max_new_tokens compile_config disable_compile "
        "low_memory prefill_chunk_size continuous_batching_config early_stopping is_assistant "
        "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit "
        "assistant_ensemble_weight assistant_lookbehind target_lookbehind max_matching_ngram_size "
        "prompt_lookup_num_tokens speculation_type use_mtp trust_remote_code chat_format"
    ),
)
# generation_config.json: ways of decoding that no option here has; the values with which they do nothing.
UNSERVED_DECODING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1.0,), "min_length": (0,),
    "min_new_tokens": (0,), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "top_h": (),
    "penalty_alpha": (0.0,), "diversity_penalty": (0.0,), "length_penalty": (1.0,), "guidance_scale": (1.0,),
    "bad_words_ids": ([],), "force_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "sequence_bias": ({},), "constraints": ([],),
    "exponential_decay_length_penalty": (), "stop_strings": ([],), "max_time": (), "token_healing": (False,),
    "renormalize_logits": (False, True), "remove_invalid_values": (False, True), "watermarking_config": (),
    "dola_layers": (),
}  # fmt: skip

TOKENIZER_KEYS = KnownKeys(
    read=words(
        "bos_token eos_token unk_token sep_token pad_token cls_token mask_token additional_special_tokens "
        "extra_special_tokens added_tokens_decoder add_bos_token add_eos_token chat_template tokenizer_class"
    ),
    unused=words(
        "model_max_length max_length max_len stride truncation truncation_strategy truncation_side padding "
        "padding_side pad_to_multiple_of pad_token_type_id model_input_names clean_up_tokenization_spaces legacy "
        "use_default_system_prompt sp_model_kwargs errors add_prefix_space spaces_between_special_tokens use_fast "
        "from_slow name_or_path special_tokens_map_file tokenizer_file vocab_file merges_file processor_class auto_map "
        "is_local local_files_only backend device_map return_token_type_ids trust_remote_code fix_mistral_regex "
        "model_specific_special_tokens response_schema add_special_tokens do_lower_case tokenize_chinese_chars "
        "strip_accents trim_offsets unk_id remove_space keep_accents init_inputs language "
        "prefix_token middle_token suffix_token eot_token fill_token suffix_first "
        "image_token audio_token video_token boi_token eoi_token"
    ),
    neutral={"split_special_tokens": (False,)},
)

# GGUF: <architecture>.* without the prefix.
GGUF_ARCHITECTURE_KEYS = KnownKeys(
    read=words(
        "context_length embedding_length block_count feed_forward_length attention.head_count "
        "attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon "
        "attention.scale attention.sliding_window rope.dimension_count rope.freq_base rope.scale_linear "
        "rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scaling.attn_factor "
        "rope.scaling.yarn_attn_factor rope.scaling.yarn_ext_factor rope.scaling.yarn_beta_fast "
        "rope.scaling.yarn_beta_slow"
    ),
    unused=words(
        "vocab_size tensor_data_layout rope.scaling.finetuned attention.layer_norm_epsilon expert_used_count "
        "attention.sliding_window_pattern rope.freq_base_swa rope.dimension_count_swa attention.key_length_swa "
        "attention.value_length_swa decoder_start_token_id"
    ),
    neutral={
        "use_parallel_residual": (False,), "attention.causal": (True,), "attention.clamp_kqv": (0.0,),
        "attention.max_alibi_bias": (0.0,), "attention.output_scale": (0.0, 1.0),
        "attention.temperature_length": (0,), "attention.temperature_scale": (0.0,),
        "attention.shared_kv_layers": (0,), "expert_count": (0,), "leading_dense_block_count": (0,),
        "nextn_predict_layers": (0,), "pooling_type": (0,), "logit_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0),
        "embedding_scale": (0.0, 1.0), "attn_logit_softcapping": (0.0,), "final_logit_softcapping": (0.0,),
        "router_logit_softcapping": (0.0,), "rope.dimension_sections": (), "rope.scaling.alpha": (0.0,),
        "rope.scaling.yarn_log_multiplier": (0.0,), "embedding_length_out": (), "full_attention_interval": (1,),
        "activation_sparsity_scale": (), "swin_norm": (False,), "attention.indexer.head_count": (0,),
        "attention.indexer.key_length": (0,), "attention.indexer.top_k": (0,), "swiglu_clamp_exp": (0.0,),
        "swiglu_clamp_shexp": (0.0,), "expert_group_scale": (0.0, 1.0), "experts_per_group": (0,),
        "expert_chunk_feed_forward_length": (0,), "expert_shared_feed_forward_length": (0,),
        "interleave_moe_layer_step": (0, 1), "moe_every_n_layers": (0, 1), "moe_latent_size": (0,),
        "rescale_every_n_layers": (0,), "token_shift_count": (0,), "n_deepstack_layers": (0,),
    },
)  # fmt: skip
_GGUF_LATENT_KEYS = words(
    "attention.q_lora_rank attention.kv_lora_rank attention.key_length_mla attention.value_length_mla expert_count "
    "expert_used_count expert_shared_count expert_feed_forward_length expert_gating_func expert_weights_scale "
    "expert_weights_norm expert_group_count expert_group_used_count leading_dense_block_count "
    "expert_shared_feed_forward_length rope.scaling.yarn_log_multiplier"
)
GGUF_KEYS = KnownKeys(
    read=words(
        "general.architecture general.alignment tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens "
        "tokenizer.ggml.token_type tokenizer.ggml.scores tokenizer.ggml.merges tokenizer.ggml.bos_token_id "
        "tokenizer.ggml.eos_token_id tokenizer.ggml.eot_token_id tokenizer.ggml.eom_token_id "
        "tokenizer.ggml.unknown_token_id tokenizer.ggml.padding_token_id tokenizer.ggml.add_bos_token "
        "tokenizer.ggml.add_eos_token tokenizer.ggml.add_space_prefix tokenizer.chat_template tokenizer.chat_templates "
        "tokenizer.ggml.seperator_token_id tokenizer.ggml.mask_token_id tokenizer.ggml.cls_token_id "
        "general.sampling.temp general.sampling.top_k general.sampling.top_p general.sampling.min_p "
        "general.sampling.penalty_repeat"
    ),
    unused=words(
        "GGUF.version GGUF.tensor_count GGUF.kv_count tokenizer.ggml.token_type_count tokenizer.huggingface.json "
        "tokenizer.rwkv.world tokenizer.ggml.add_sep_token tokenizer.ggml.fim_pre_token_id "
        "tokenizer.ggml.fim_suf_token_id tokenizer.ggml.fim_mid_token_id tokenizer.ggml.fim_pad_token_id "
        "tokenizer.ggml.fim_rep_token_id tokenizer.ggml.fim_sep_token_id tokenizer.ggml.prefix_token_id "
        "tokenizer.ggml.suffix_token_id tokenizer.ggml.middle_token_id general.type general.quantization_version "
        "general.file_type general.name general.author general.version general.organization general.finetune "
        "general.basename general.description general.quantized_by general.size_label general.license general.url "
        "general.doi general.uuid general.repo_url general.tags general.languages general.datasets general.source.url"
    ),
    neutral={"tokenizer.ggml.remove_extra_whitespaces": (False,), "tokenizer.ggml.precompiled_charsmap": ([],)},
    prefixes=(
        "tokenizer.chat_template.",  # read: templates by name
        "general.source.", "general.base_model.", "general.dataset.", "general.license.",
        "split.", "quantize.imatrix.", "imatrix.", "mradermacher.",
    ),
)  # fmt: skip


def gguf_architecture_keys(architecture: str) -> KnownKeys:
    """The keys of GGUF metadata for one architecture, without its name before."""
    every = GGUF_ARCHITECTURE_KEYS
    if architecture != "deepseek2":
        return every
    neutral = {key: values for key, values in every.neutral.items() if key not in _GGUF_LATENT_KEYS}
    return replace(every, read=every.read | _GGUF_LATENT_KEYS, unused=every.unused - _GGUF_LATENT_KEYS, neutral=neutral)


def config_keys(architecture: str) -> KnownKeys:
    """The keys of config.json for one architecture."""
    # One that was added to the table of architectures has no keys of its own here: it may have those of all others.
    every = frozenset[str]().union(*_ARCHITECTURE_READ.values())
    return KnownKeys(
        read=_ANY_CONFIG_READ | _ARCHITECTURE_READ.get(architecture, every),
        unused=_ANY_CONFIG_UNUSED | _ARCHITECTURE_UNUSED.get(architecture, frozenset()),
        neutral=_ANY_CONFIG_NEUTRAL | _ARCHITECTURE_NEUTRAL.get(architecture, {}),
    )
