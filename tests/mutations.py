"""Deliberate bugs, each of which one named test must catch: `python tests/mutations.py`.

Every entry is a mistake that a published implementation made or that is easily made: the sign or
the direction of KL, an index off by one, a mask forgotten, a clip turned round. The script copies
package and tests to a temporary folder, plants one bug at a time, runs the named test alone and
prints a table; it exits with 1 if a bug survives. Words given to it select entries by title.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """One planted bug: in minirlhf/`file`, `old` becomes `new`, and `test` must fail."""

    title: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = [
    Mutation(
        "every chunk hands on the gradients of the first",
        "engine/compute.py",
        "ctx.walks[ctx.number].result()",
        "ctx.walks[0].result()",
        "test_packing.py::test_packed_loss_and_gradient_are_the_plain_ones",
    ),
    Mutation(
        "chunks come back in the order in which they were started",
        "engine/compute.py",
        "for task in reversed(started)",
        "for task in started",
        "test_packing.py::test_packed_loss_and_gradient_are_the_plain_ones",
    ),
    Mutation(
        "rows stay sorted by length",
        "model.py",
        "return torch.empty_like(x).index_copy_(0, number, x)",
        "return x",
        "test_packing.py::test_packed_loss_and_gradient_are_the_plain_ones",
    ),
    Mutation(
        "keys and values are written one column too early",
        "generate.py",
        "now = slice(cache.filled - steps, cache.filled)",
        "now = slice(max(cache.filled - steps - 1, 0), max(cache.filled - 1, steps))",
        "test_generate.py::test_sampled_logprobs_and_values_are_those_of_the_scoring_pass",
    ),
    Mutation(
        "a worker thread computes with the gradient mode of a fresh thread",
        "engine/compute.py",
        "torch.inference_mode(inference), torch.set_grad_enabled(bool(learners))",
        "torch.set_grad_enabled(True)",
        "test_cores.py::test_workers_have_the_gradient_mode_of_who_asks",
    ),
    Mutation(
        "k1 with the wrong sign",
        "kl.py",
        "    return logprobs - ref_logprobs\n",
        "    return ref_logprobs - logprobs\n",
        "test_kl.py::test_means_by_enumeration",
    ),
    Mutation(
        "k3 with the ratio inverted",
        "kl.py",
        "torch.expm1(-log_ratio) + log_ratio",
        "torch.expm1(log_ratio) - log_ratio",
        "test_kl.py::test_means_by_enumeration",
    ),
    Mutation(
        "exact KL in the other direction",
        "kl.py",
        "    p = logp.exp()\n",
        "    p = ref_logp.exp()\n",
        "test_kl.py::test_exact_kl_against_float64_sums_and_its_edges",
    ),
    Mutation(
        "KL of an answer as a mean where a sum was asked for",
        "kl.py",
        'if aggregation == "token_mean":',
        'if aggregation == "sequence_sum":',
        "test_kl.py::test_sequence_sum_grows_with_length_and_token_mean_does_not",
    ),
    Mutation(
        "adaptive beta moves the wrong way",
        "kl.py",
        "kl / self.target - 1.0",
        "1.0 - kl / self.target",
        "test_kl.py::test_adaptive_beta_in_closed_form",
    ),
    Mutation(
        "the penalty pays for drift",
        "advantages.py",
        "torch.where(mask, -beta * kl, 0.0)",
        "torch.where(mask, beta * kl, 0.0)",
        "test_ppo_losses.py::test_drift_costs_and_agreement_pays_nothing",
    ),
    Mutation(
        "the score one token early",
        "advantages.py",
        "rewards[rows, last[rows]] +=",
        "rewards[rows, last[rows] - 1] +=",
        "test_advantages.py::test_score_sits_on_the_last_token_and_kl_on_every_one",
    ),
    Mutation(
        "GAE runs through tokens that the policy did not choose",
        "advantages.py",
        "running = torch.where(valid, delta + gamma * lam * running, running)",
        "running = delta + gamma * lam * running",
        "test_advantages.py::test_tokens_that_the_policy_did_not_choose_change_nothing",
    ),
    Mutation(
        "GAE forgets gamma in the decay",
        "advantages.py",
        "delta + gamma * lam * running",
        "delta + lam * running",
        "test_advantages.py::test_gae_by_hand_with_the_score_on_eos",
    ),
    Mutation(
        "whitening with the shift flag inverted",
        "advantages.py",
        "(0.0 if shift_mean else mean)",
        "(mean if shift_mean else 0.0)",
        "test_advantages.py::test_whitened_entries_have_mean_zero_and_variance_one",
    ),
    Mutation(
        "scaling that centres as well",
        "advantages.py",
        "torch.where(mask, x / whitening_moments(x, mask)[1], 0.0)",
        "whiten(x, mask)",
        "test_advantages.py::test_rescaling_keeps_signs_and_whitening_without_shift_keeps_the_mean",
    ),
    Mutation(
        "scaling that keeps the mean whole, as reward whitening does elsewhere",
        "advantages.py",
        "torch.where(mask, x / whitening_moments(x, mask)[1], 0.0)",
        "whiten(x, mask, shift_mean=False)",
        "test_advantages.py::test_rescaling_keeps_signs_and_whitening_without_shift_keeps_the_mean",
    ),
    Mutation(
        "the part of the shift with the wrong sign",
        "advantages.py",
        "-mean / sd if shift else 0.0",
        "mean / sd if shift else 0.0",
        "test_advantages.py::test_the_split_goes_through_whitening",
    ),
    Mutation(
        "a part of the advantage twice",
        "advantages.py",
        "baseline=part(no_score, zeros, rollout.values)",
        "baseline=part(no_score, kl, rollout.values)",
        "test_advantages.py::test_parts_add_up_to_gae",
    ),
    Mutation(
        "advantages centred where their signs were to be kept",
        "ppo.py",
        'if config.whiten_advantages == "shift_scale" else',
        'if config.whiten_advantages == "scale" else',
        "test_ppo_losses.py::test_returns_are_never_whitened",
    ),
    Mutation(
        "scores scaled around their mean instead of around 0",
        "ppo.py",
        "scores = rescale(scores, torch.ones_like(scores, dtype=torch.bool))",
        "scores = whiten(scores, torch.ones_like(scores, dtype=torch.bool), shift_mean=False)",
        "test_ppo_losses.py::test_whitening_scores_rescales_beta_and_whitening_rewards_does_not",
    ),
    Mutation(
        "a mean over padding too",
        "advantages.py",
        ".sum() / mask.sum().clamp(min=1)",
        ".sum() / mask.numel()",
        "test_ppo.py::test_padding_changes_no_metric_and_no_gradient",
    ),
    Mutation(
        "GRPO without the group's mean",
        "advantages.py",
        "    centred = r - r.mean(1, keepdim=True)\n",
        "    centred = r\n",
        "test_advantages.py::test_grpo_is_the_group_score_and_dr_grpo_only_centres",
    ),
    Mutation(
        "RLOO's baseline includes the answer itself",
        "advantages.py",
        "((r - r.mean(1, keepdim=True)) * group / (group - 1))",
        "(r - r.mean(1, keepdim=True))",
        "test_advantages.py::test_rloo_is_each_answer_against_the_mean_of_the_others",
    ),
    Mutation(
        "the split loses the sign of the KL part",
        "advantages.py",
        "kl=part(no_score, kl, zeros)",
        "kl=part(no_score, -kl, zeros)",
        "test_advantages.py::test_parts_add_up_in_degenerate_batches",
    ),
    Mutation(
        "log-probs off by one token",
        "model.py",
        "found = [token_logprobs(logits, x[at],",
        "found = [token_logprobs(logits, x.roll(-1, 1)[at],",
        "test_model.py::test_all_answers_together_have_probability_one",
    ),
    Mutation(
        "the state after a token instead of before it",
        "model.py",
        "tokens = torch.cat([prompts, responses[:, :-1]], 1)",
        "tokens = torch.cat([prompts[:, :-1], responses], 1)",
        "test_model.py::test_response_outputs_are_the_states_before_each_token",
    ),
    Mutation(
        "temperature multiplied instead of divided",
        "model.py",
        "(logits / temperature if",
        "(logits * temperature if",
        "test_model.py::test_token_logprobs_of_a_two_token_language",
    ),
    Mutation(
        "a pad id inside an answer ends it",
        "model.py",
        "    valid = (tokens != PAD).cumsum(1) > 0  # a pad",
        "    valid = tokens != PAD  # a pad",
        "test_model.py::test_a_pad_id_that_was_sampled_is_a_token_like_others",
    ),
    Mutation(
        "the reward model reads at the padding",
        "model.py",
        "    last = last_token(mask)\n",
        "    last = last_token(torch.ones_like(mask))\n",
        "test_model.py::test_answer_scalars_read_after_the_last_token_whatever_the_padding",
    ),
    Mutation(
        "the mask forgets EOS",
        "generate.py",
        "mask = ends.cumsum(0) == ends",
        "mask = ends.cumsum(0) == 0",
        "test_generate.py::test_mask_is_true_up_to_and_including_eos",
    ),
    Mutation(
        "sampling at one temperature, logging at another",
        "generate.py",
        "_pick(logits if temperature == 1.0 else logits / temperature,",
        "_pick(logits,",
        "test_generate.py::test_sampled_logprobs_and_values_are_those_of_the_scoring_pass",
    ),
    Mutation(
        "the inverse CDF may pick what has no probability",
        "generate.py",
        "right=True",
        "right=False",
        "test_generate.py::test_inverse_cdf_at_its_edges",
    ),
    Mutation(
        "Adam without bias correction",
        "engine/adamw.py",
        "scale = self.lr / (1 - b1**self.steps)",
        "scale = self.lr",
        "test_optim.py::test_twenty_steps_equal_torch",
    ),
    Mutation(
        "the clip reversed for A < 0",
        "ppo.py",
        "surrogate = torch.minimum(ratio * advantages, bounded * advantages)",
        "surrogate = torch.where(advantages < 0, torch.maximum(ratio * advantages, "
        "bounded * advantages), torch.minimum(ratio * advantages, bounded * advantages))",
        "test_ppo_losses.py::test_clip_truth_table",
    ),
    Mutation(
        "the ratio upside down",
        "ppo.py",
        "    ratio = (logprobs - old_logprobs).exp()\n",
        "    ratio = (old_logprobs - logprobs).exp()\n",
        "test_ppo_losses.py::test_clip_truth_table",
    ),
    Mutation(
        "the value clip takes the smaller error",
        "ppo.py",
        "error = torch.maximum(error,",
        "error = torch.minimum(error,",
        "test_ppo_losses.py::test_value_loss_by_hand",
    ),
    Mutation(
        "answers that ended are punished for not ending",
        "ppo.py",
        "torch.where(finished, scores, scores - config.missing_eos_penalty)",
        "torch.where(finished, scores - config.missing_eos_penalty, scores)",
        "test_ppo_losses.py::test_missing_eos",
    ),
    Mutation(
        "KL charged in the reward and in the loss",
        "ppo.py",
        'charged = beta if config.kl_place == "reward" else 0.0',
        "charged = beta",
        "test_ppo_losses.py::test_kl_elsewhere_is_measured_but_not_charged",
    ),
    Mutation(
        "the KL loss without a gradient",
        "ppo.py",
        "kl_tokens(logprobs, ref, mask, estimator=kind",
        "kl_tokens(batch.logprobs, ref, mask, estimator=kind",
        "test_ppo_losses.py::test_expected_gradient_of_each_placement",
    ),
    Mutation(
        "the reference scored at temperature 1",
        "ppo.py",
        "self.reference, *given, temperature=self._config.temperature, eos=self.eos",
        "self.reference, *given, eos=self.eos",
        "test_ppo.py::test_at_the_start_kl_is_zero_and_the_ratio_one",
    ),
    Mutation(
        "the reference is the policy",
        "ppo.py",
        "policy.requires_grad_(True), reference.requires_grad_(False)",
        "policy.requires_grad_(True), policy",
        "test_ppo.py::test_the_reference_never_moves_and_the_policy_does",
    ),
    Mutation(
        "a copy of a frozen reference stays frozen",
        "ppo.py",
        "policy.requires_grad_(True), reference",
        "policy, reference",
        "test_ppo.py::test_a_second_run_may_start_from_a_copy_of_a_used_reference",
    ),
    Mutation(
        "an EOS in the prompt counts as the end of the answer",
        "ppo.py",
        "finished = ((responses == self.eos) & mask).any(-1)",
        "finished = (torch.cat([prompts, responses], 1) == self.eos).any(-1)",
        "test_ppo.py::test_a_rollout_knows_where_it_came_from_and_how_it_ended",
    ),
    Mutation(
        "group members answer different prompts",
        "ppo.py",
        "drawn.repeat_interleave(each)",
        "drawn.repeat(each)",
        "test_ppo.py::test_group_members_answer_one_prompt",
    ),
    Mutation(
        "a NaN gradient reaches the weights",
        "ppo.py",
        "torch.isfinite(loss + norm)",
        "torch.isfinite(loss)",
        "test_ppo.py::test_a_finite_loss_with_a_nan_gradient_does_too",
    ),
    Mutation(
        "a resumed run draws other answers",
        "ppo.py",
        'self.generator.set_state(state["generator"])',
        "pass",
        "test_ppo.py::test_a_run_resumed_from_a_file_ends_bit_for_bit_the_same",
    ),
    Mutation(
        "the loser wins",
        "reward.py",
        "F.logsigmoid(chosen - rejected - margin)",
        "F.logsigmoid(rejected - chosen - margin)",
        "test_reward.py::test_bradley_terry_loss_and_gradient_in_closed_form",
    ),
    Mutation(
        "a fact said twice earns twice",
        "desk.py",
        "for key in tries - tried))",
        "for key in tries))",
        "test_desk.py::test_hand_graded_answers",
    ),
    Mutation(
        "labels the wrong way round",
        "preferences.py",
        ".swap(rng.random(len(pairs)) >= p)",
        ".swap(rng.random(len(pairs)) < p)",
        "test_preferences.py::test_labels_fall_as_often_as_their_probability_says",
    ),
    Mutation(
        "the critic's fit counts tokens, not answers",
        "critic.py",
        "share = 1 / rollout.lengths[:, None]",
        "share = 1 / torch.ones_like(rollout.lengths)[:, None]",
        "test_critic.py::test_the_fit_is_weighted_ridge_regression_by_another_solver",
    ),
    Mutation(
        "the critic's fit sees the next reward only",
        "critic.py",
        "rollout.rewards.flip(1).cumsum(1).flip(1)",
        "rollout.rewards",
        "test_critic.py::test_a_planted_linear_value_is_recovered",
    ),
    Mutation(
        "strata by label instead of by the reference's own length",
        "audit.py",
        "np.where(self.reference_length < config.brief_below, *STRATA)",
        "np.array([prompt.stratum for prompt in self.probes])",
        "test_audit.py::test_strata_are_measured_from_the_references_own_lengths",
    ),
    Mutation(
        "a wrong answer counts as a concise one",
        "facts.py",
        '(padding == 0) & grades["correct"]',
        "padding == 0",
        "test_facts.py::test_batch_facts_by_hand",
    ),
    Mutation(
        "the top tenth of tokens and padding",
        "facts.py",
        "sizes = log_ratio[mask].abs()",
        "sizes = log_ratio.flatten().abs()",
        "test_facts.py::test_batch_facts_by_hand",
    ),
    Mutation(
        "every stage draws the same random numbers",
        "upstream.py",
        "[self.config.seed, zlib.crc32(name.encode())]",
        "[self.config.seed, 0]",
        "test_drift.py::test_every_stage_draws_from_a_stream_of_its_own",
    ),
    Mutation(
        "the checkpoint before its own audit",
        "drift.py",
        "self.audit(self.ppo.policy, self.ppo.steps)\n                self._save_ppo()\n",
        "self._save_ppo()\n                self.audit(self.ppo.policy, self.ppo.steps)\n",
        "test_drift.py::test_killed_before_any_step_and_resumed_is_the_same_run",
    ),
    Mutation(
        "a resumed run forgets the steps before",
        "drift.py",
        '        for name in ("history", "metrics", "answers", "batches"):\n',
        '        for name in ("history", "answers", "batches"):\n',
        "test_drift.py::test_killed_before_any_step_and_resumed_is_the_same_run",
    ),
    Mutation(
        "a claim is held whatever its threshold",
        "seeds.py",
        "(values >= claim.low)",
        "(values > -np.inf)",
        "test_seeds.py::test_a_threshold_that_is_missed_is_not_held",
    ),
    Mutation(
        "a rebuild that removes a lecturer's files",
        "shipped.py",
        "for pattern in OURS for path in folder.glob(pattern)",
        'for path in folder.rglob("*.safetensors")',
        "test_shipped.py::test_a_rebuild_removes_what_is_stale_and_nothing_else",
    ),
    Mutation(
        "an error that ends with status 0",
        "cli.py",
        '        print(f"minirlhf: {error}", file=sys.stderr)\n        return 1\n',
        '        print(f"minirlhf: {error}", file=sys.stderr)\n        return 0\n',
        "test_bad_input.py::test_on_the_command_line",
    ),
    Mutation(
        "a file is written where it is read",
        "engine/files.py",
        "        write(scratch)\n        scratch.replace(path)\n",
        "        write(path)\n",
        "test_store.py::test_a_full_disk_leaves_the_old_file_and_no_scrap",
    ),
    Mutation(
        "the split pays an answer's KL to the baseline of its group",
        "autopsy.py",
        "    parts = (scores, cost, whole - scores - cost)\n",
        "    parts = (scores, 0 * cost, whole - scores)\n",
        "test_autopsy.py::test_parts_of_group_baselines_by_hand",
    ),
    Mutation(
        "a score after EOS falls on the first slot of an empty row",
        "autopsy.py",
        "mask = mask | (after & before)",
        "mask = mask | after",
        "test_autopsy.py::test_the_score_one_slot_after_eos_by_hand",
    ),
    Mutation(
        "whitening's shift with the wrong sign in the autopsy",
        "autopsy.py",
        "c.keep_mean * mean - mean / sd",
        "c.keep_mean * mean + mean / sd",
        "test_autopsy.py::test_whitening_by_answer_and_keeping_the_mean",
    ),
    Mutation(
        "rewards are whitened in the split but not in its KL",
        "autopsy.py",
        "        scores, kl = scores / sd, kl / sd\n",
        "        scores = scores / sd\n",
        "test_autopsy.py::test_whitened_rewards_have_parts_too",
    ),
    Mutation(
        "the bootstrap resamples answers as if prompts had one each",
        "autopsy.py",
        "    asked = rollout.prompts if rollout.index is None else rollout.index[:, None]\n",
        "    asked = torch.arange(len(rollout))[:, None]\n",
        "test_autopsy.py::test_intervals_cover_what_they_say",
    ),
    Mutation(
        "a share of tokens as a mean of answers",
        "autopsy.py",
        "(((rollout.advantages > 0) & mask).sum(1), n)",
        "(((rollout.advantages > 0) & mask).sum(1) / n.clamp(min=1), one)",
        "test_autopsy.py::test_facts_by_hand",
    ),
    Mutation(
        "the push forgets what the clip has cut",
        "push.py",
        '"style": config.clip_style',
        '"style": "none"',
        "test_autopsy.py::test_pushes_by_part_and_by_class_sum_to_the_whole",
    ),
    Mutation(
        "the push forgets the value loss on the shared trunk",
        "push.py",
        'found["value_loss"] = -c.value_coef *',
        'found["value_loss"] = 0 *',
        "test_autopsy.py::test_pushes_by_part_and_by_class_sum_to_the_whole",
    ),
    Mutation(
        "the push ignores that gradients are clipped",
        "push.py",
        "(limit / (gradient.norm() + 1e-6)).clamp(max=1.0)",
        "(limit / (gradient.norm() + 1e-6)).clamp(min=1.0, max=1.0)",
        "test_autopsy.py::test_push_is_a_real_sgd_step_to_first_order",
    ),
    Mutation(
        "Adam's push without its first moment",
        "push.py",
        "-rate * b1 * o.mean",
        "0 * rate * o.mean",
        "test_autopsy.py::test_push_under_adam_with_a_past",
    ),
    Mutation(
        "a what-if that moves the run",
        "push.py",
        "policy, given = copy.deepcopy(run.policy), (",
        "policy, given = run.policy, (",
        "test_autopsy.py::test_another_epsilon_takes_the_real_update_again",
    ),
    Mutation(
        "the fitted beta forgets the scale of whitening",
        "whatif.py",
        'float(f"{b / a:.6g}")',
        'float(f"{b:.6g}")',
        "test_autopsy.py::test_the_convention_that_made_a_log_is_found",
    ),
    Mutation(
        "a critic fitted again sees the rewards of before",
        "whatif.py",
        "change = _to_come(batch, after) - _to_come(logged, before)",
        "change = _to_come(batch, before) - _to_come(logged, before)",
        "test_autopsy.py::test_a_critic_fitted_again_absorbs_the_cost_of_kl",
    ),
    Mutation(
        "another epsilon is vacuous and nobody says so",
        "whatif.py",
        "if moved.abs().max() < 1e-4:",
        "if moved.abs().max() < 0:",
        "test_autopsy.py::test_bad_batches_are_answered_with_one_sentence",
    ),
    Mutation(
        "the tilt with beta for 1 / beta",
        "oracle.py",
        'torch.sigmoid(p0.logit() + gap / _double("beta", beta, "positive"))',
        'torch.sigmoid(p0.logit() + gap * _double("beta", beta, "positive"))',
        "test_oracle.py::test_two_answers_by_hand",
    ),
    Mutation(
        "k3's pull with the ratio inverted",
        "oracle.py",
        "slopes = (-concise).exp() - (-verbose).exp()",
        "slopes = verbose.exp() - concise.exp()",
        "test_oracle.py::test_the_pull_is_the_expected_gradient",
    ),
    Mutation(
        "the largest drift at exp(k), not exp(k / 2)",
        "oracle.py",
        "torch.sigmoid(-k / 2)",
        "torch.sigmoid(-k)",
        "test_oracle.py::test_the_prompt_that_moves_most_is_brief",
    ),
    Mutation(
        "net advantages with the shares of p and 1 - p exchanged",
        "oracle.py",
        "return (1 - p) * net, -p * net",
        "return p * net, -(1 - p) * net",
        "test_oracle.py::test_net_advantages_say_which_side_of_the_optimum_p_is_on",
    ),
    Mutation(
        "the chain's values are discounted once too often",
        "oracle.py",
        "start = p * out[..., 0, 0] + (1 - p) * out[..., 1, 0]",
        "start = gamma * (p * out[..., 0, 0] + (1 - p) * out[..., 1, 0])",
        "test_oracle.py::test_values_are_the_mean_of_the_returns",
    ),
    Mutation(
        "PPO charges KL as a bonus",
        "advantages.py",
        "rewards = torch.where(mask, -beta * kl, 0.0)",
        "rewards = torch.where(mask, beta * kl, 0.0)",
        "test_oracle.py::test_ppo_ends_where_theory_says",
    ),
    Mutation(
        "an interrupted step of the live run leaves half a step behind",
        "lab/live_run.py",
        "            self.run.load_state_dict(before)\n            raise\n",
        "            raise\n",
        "test_live_run.py::test_an_interrupt_keeps_every_whole_step",
    ),
    Mutation(
        "an interrupted step of the live run puts beta back to where the run began",
        "lab/live_run.py",
        "        before = self.run.state_dict()\n",
        '        before = self.run.state_dict() | {"beta": self._start["beta"]}\n',
        "test_live_run.py::test_an_interrupt_in_the_step_of_a_turned_dial_loses_neither",
    ),
    Mutation(
        "the live run's length bias turns nothing",
        "lab/live_run.py",
        'self._scorers[dials["length_bias"]]',
        'self._scorers[self._first["length_bias"]]',
        "test_live_run.py::test_the_length_bias_swaps_what_pays_the_run",
    ),
    Mutation(
        "pause waits for the step in flight",
        "lab/live_run.py",
        '            self._stop.set()\n            self._says = "pausing"',
        '            self._halt()\n            self._says = "pausing"',
        "test_live_run.py::test_pause_answers_at_once_while_a_step_is_in_flight",
    ),
    Mutation(
        "a closed live run goes on learning",
        "lab/live_run.py",
        '"""Stop the thread, then close the panel."""\n        self._halt()',
        '"""Stop the thread, then close the panel."""',
        "test_live_run.py::test_running_the_cell_again_stops_the_old_thread",
    ),
    Mutation(
        "heat map: words of a batch are not escaped",
        "lab/heatmap.py",
        "text = html.escape(visible(word))",
        "text = visible(word)",
        "test_heatmap.py::test_texts_of_a_batch_are_data",
    ),
    Mutation(
        "heat map: orange is above 0",
        "lab/heatmap.py",
        'sign, level = "n" if value < 0 else "p"',
        'sign, level = "n" if value > 0 else "p"',
        "test_heatmap.py::test_every_token_is_there_with_its_value_and_within_reach_of_the_keyboard",
    ),
    Mutation(
        "heat map: marks where the reference did stop and the policy too",
        "lab/heatmap.py",
        "rollout.mask & (rollout.responses != eos)",
        "rollout.mask",
        "test_heatmap.py::test_stops_that_were_passed_up",
    ),
    Mutation(
        "batch table: answers without a token come first when sorted from the top",
        "lab/batch_table.py",
        "np.where(np.isnan(values), np.inf, rank)",
        "np.where(np.isnan(values), -np.inf, rank)",
        "test_heatmap.py::test_order_keeps_ties_and_puts_nan_last",
    ),
    Mutation(
        "batch table: mean advantage over the padded width",
        "lab/batch_table.py",
        "np.where(length > 0, length, np.nan)",
        "np.where(length > 0, mask.shape[1], np.nan)",
        "test_heatmap.py::test_columns_by_hand",
    ),
    Mutation(
        "the non-length share weighs bins by the policy's answers alone",
        "spurious.py",
        "counts[:, both].sum(0)",
        "counts[1, both]",
        "test_spurious.py::test_bins_weigh_by_their_answers_on_both_sides",
    ),
    Mutation(
        "bins that one side leaves empty count in the non-length gain",
        "spurious.py",
        "both = (counts > 0).all(0)",
        "both = (counts > 0).any(0)",
        "test_spurious.py::test_a_bin_without_a_partner_drops_out_and_is_counted",
    ),
    Mutation(
        "slopes one column at a time: length is not held against gold",
        "spurious.py",
        "np.linalg.lstsq(scaled[:, 1:][:, varies], scaled[:, 0], rcond=None)[0]",
        "(scaled[:, 1:][:, varies] * scaled[:, :1]).mean(0)",
        "test_spurious.py::test_slopes_are_partial_and_standardised",
    ),
    Mutation(
        "each table is drawn anew by itself: pairs of answers to a prompt are torn",
        "spurious.py",
        "{name: c[index] for name, c in t.items()}",
        "{name: c[rng.integers(size, size=size)] for name, c in t.items()}",
        "test_spurious.py::test_prompts_are_drawn_whole_so_that_pairs_stay_pairs",
    ),
    Mutation(
        "the alarm takes its record for the truth",
        "monitor.py",
        "_scale(_redraw(x, len(x), rng))",
        "_scale(x)",
        "test_monitor.py::test_false_alarms_come_as_often_as_was_set",
    ),
    Mutation(
        "CUSUM saves up good days",
        "monitor.py",
        "np.maximum(0.0, total + z[..., day, :] - slack)",
        "total + z[..., day, :] - slack",
        "test_monitor.py::test_cusum_by_hand",
    ),
    Mutation(
        "a day's sd mixes in how probes differ",
        "monitor.py",
        "np.sqrt(x.var(0, ddof=1).sum(0)) / x.shape[1]",
        "x.std((0, 1)) / x.shape[1] ** 0.5",
        "test_monitor.py::test_scale_is_that_of_days_with_fixed_probes",
    ),
    Mutation(
        "stopping counts states after an answer's end",
        "audit.py",
        "logits.softmax(-1)[..., eos] * part[1]",
        "logits.softmax(-1)[..., eos]",
        "test_strata.py::test_stopping_is_one_minus_the_chance_of_going_on_state_by_state",
    ),
    Mutation(
        "prompts are grouped by the half of the answers that is then measured",
        "lab/goodhart.py",
        "(x > tokens).mean(0) for x in (self._first, self._second)",
        "(x > tokens).mean(0) for x in (self._first, self._first)",
        "test_goodhart_lab.py::test_groups_are_made_by_one_half_and_measured_on_the_other",
    ),
    Mutation(
        "batch panel: the words' map arrives a message before the picture",
        "lab/batch.py",
        "        with self.lock, self.view.hold_sync():\n",
        "        with self.lock:\n",
        "test_batch_lab.py::test_words_picture_and_reasons_leave_in_one_message",
    ),
    Mutation(
        "batch panel: epsilon's update keeps the logged advantages",
        "lab/batch.py",
        "advantages=found.to(dtype), returns",
        "advantages=self._batch.advantages, returns",
        "test_batch_lab.py::test_an_update_is_reused_and_says_so_where_beta_has_moved",
    ),
    Mutation(
        "batch panel: a stale update is called exact",
        "lab/batch.py",
        "        if at == dials:\n",
        "        if at:\n",
        "test_batch_lab.py::test_an_update_is_reused_and_says_so_where_beta_has_moved",
    ),
    Mutation(
        "batch panel: the clip scales nothing that is shown",
        "lab/batch.py",
        "x if slope is None else slope * x",
        "x",
        "test_batch_lab.py::test_a_smaller_epsilon_cuts_more_tokens",
    ),
    Mutation(
        "batch panel: every length bias shows the logged scores",
        "whatif.py",
        "raw = {name: split(replace(rollout, scores=x), unit)",
        "raw = {name: split(rollout, unit)",
        "test_batch_lab.py::test_without_length_bias_the_reward_part_of_verbose_answers_falls",
    ),
    Mutation(
        "batch panel: the waterfall's parts all start at zero",
        "lab/batch_plots.py",
        "[0.0, *np.cumsum(sizes[:-2]), 0.0]",
        "[0.0] * len(sizes)",
        "test_batch_lab.py::test_the_waterfall_starts_each_part_where_the_last_one_ended",
    ),
    Mutation(
        "ratio figure: the cut sides are turned round",
        "lab/batch_plots.py",
        "        edge = 1 + sign * eps\n",
        "        edge = 1 - sign * eps\n",
        "test_batch_lab.py::test_the_clip_cuts_rising_tokens_above_and_falling_ones_below",
    ),
    Mutation(
        "fork: advantages of answers that took other words before",
        "lab/batch_plots.py",
        "rollout.responses[:, :at] == one.responses[:, :at]",
        "rollout.responses[:, : at + 1] == one.responses[:, : at + 1]",
        "test_batch_lab.py::test_the_fork_reads_both_models_and_the_advantage_of_what_was_taken",
    ),
    Mutation(
        "what-if epsilon: nobody is told of the minibatches",
        "whatif.py",
        "            copied.loss = _watched(copied.loss, watch)\n",
        "            watch()\n",
        "test_batch_lab.py::test_an_update_can_be_cancelled_and_taken_anew",
    ),
    Mutation(
        "leverage without the surrogate's weight of a token",
        "push.py",
        "    return slope * _tangents(run, rollout, rate * gradient)[0]\n",
        "    return _tangents(run, rollout, rate * gradient)[0]\n",
        "test_batch_lab.py::test_the_push_on_length_is_a_real_step_to_first_order",
    ),
    Mutation(
        "length without a run: long answers count by their sum",
        "push.py",
        "(centred / lengths.clamp(min=1))[:, None]",
        "centred[:, None]",
        "test_batch_lab.py::test_without_a_run_length_moves_by_a_covariance",
    ),
    Mutation(
        "the battery prices the push that it calls free",
        "two_answers.py",
        "price_and_credit(rollout, run.config, beta)",
        "price_and_credit(rollout, run.config, kept)",
        "test_battery.py::test_the_push_is_gap_less_the_price_of_the_log_odds_moved",
    ),
    Mutation(
        "the battery's whitened scores are multiplied by their sd",
        "battery.py",
        "gap = gap / float(t.score_sd[-1])",
        "gap = gap * float(t.score_sd[-1])",
        "test_battery.py::test_ends_are_those_of_the_closed_forms",
    ),
    Mutation(
        "the battery takes no KL term for the book's",
        "battery.py",
        'e = float(world.place == "book_literal")',
        'e = float(world.place == "none")',
        "test_battery.py::test_what_was_planted_is_named_and_nothing_else[book-literal]",
    ),
    Mutation(
        "the battery takes a reference that stays for one that moves",
        "battery.py",
        "(0.0, 0.5) if world.moving else (1.0, 0.05)",
        "(1.0, 0.05) if world.moving else (0.0, 0.5)",
        "test_battery.py::test_what_was_planted_is_named_and_nothing_else[moving reference]",
    ),
    Mutation(
        "the battery names the nearest cause where none fits",
        "battery.py",
        'said, causes = "cannot tell: no cause on the list fits all the evidence", None',
        'said, causes = "cannot tell", best.causes',
        "test_battery.py::test_it_cannot_tell_what_is_not_on_the_list",
    ),
    Mutation(
        "what the battery could not measure speaks for every cause",
        "battery.py",
        "abs(measured - expected) <= within)",
        "not abs(measured - expected) > within)",
        "test_battery.py::test_what_was_not_measured_speaks_against",
    ),
    Mutation(
        "batch panel: length is what the clip leaves of the push",
        "lab/batch.py",
        "self._moves(found.parts.total)",
        "self._moves(self.seen)",
        "test_batch_lab.py::test_length_is_the_push_before_any_clip_at_every_epsilon",
    ),
    Mutation(
        "batch table: after sorting an answer out of sight stays chosen",
        "lab/batch_table.py",
        "self._list(None)",
        "self._list(self.row)",
        "test_heatmap.py::test_sorting_chooses_the_first_line_and_choosing_is_heard",
    ),
    Mutation(
        "the covariate enters the ranking loss with the wrong sign",
        "debias.py",
        "margin=-(terms @ self.phi)",
        "margin=terms @ self.phi",
        "test_debias.py::test_phi_is_the_log_odds_of_the_longer_one_where_nothing_else_differs",
    ),
    Mutation(
        "phi climbs the loss",
        "debias.py",
        "self.phi + NEWTON_RATE",
        "self.phi - NEWTON_RATE",
        "test_debias.py::test_phi_is_the_log_odds_of_the_longer_one_where_nothing_else_differs",
    ),
    Mutation(
        "the covariate is the loser's length minus the winner's",
        "debias.py",
        "pairs.chosen_mask.sum(1) - pairs.rejected_mask.sum(1)",
        "pairs.rejected_mask.sum(1) - pairs.chosen_mask.sum(1)",
        "test_debias.py::test_phi_is_the_log_odds_of_the_longer_one_where_nothing_else_differs",
    ),
    Mutation(
        "phi starts at 0, so that r takes length in first",
        "debias.py",
        "for _ in range(200):",
        "for _ in range(0):",
        "test_debias.py::test_filler_is_worth_much_less_to_a_transformer_fitted_with_the_covariate",
    ),
    Mutation(
        "ODIN pushes length out of the length head",
        "debias.py",
        "(quality.abs() - length)",
        "(quality.abs() + length)",
        "test_debias.py::test_odins_loss_is_the_sum_of_its_parts_in_float64",
    ),
    Mutation(
        "ODIN keeps the length head",
        "debias.py",
        "F.normalize(trunk.scalar.weight)[:1]",
        "F.normalize(trunk.scalar.weight)[1:]",
        "test_debias.py::test_odin_takes_length_out_of_the_head_it_keeps_and_into_the_other",
    ),
    Mutation(
        "ODIN's heads may shrink",
        "debias.py",
        "F.linear(x, F.normalize(self.weight))",
        "F.linear(x, self.weight)",
        "test_debias.py::test_heads_are_read_at_length_one_however_large_their_weights_are",
    ),
    Mutation(
        "DPO prefers the loser",
        "dpo.py",
        "(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)",
        "(policy_rejected - ref_rejected) - (policy_chosen - ref_chosen)",
        "test_dpo.py::test_the_loss_is_the_papers_in_float64",
    ),
    Mutation(
        "DPO forgets the reference",
        "dpo.py",
        "(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)",
        "policy_chosen - policy_rejected",
        "test_dpo.py::test_two_answers_end_at_the_tilted_reference",
    ),
    Mutation(
        "DPO takes a mean over tokens",
        "dpo.py",
        "[0].sum(1).chunk(2)",
        "[0].mean(1).chunk(2)",
        "test_dpo.py::test_log_probs_are_sums_over_the_tokens_of_an_answer",
    ),
    Mutation(
        "DPO asks the reference about other pairs",
        "dpo.py",
        "reference_logprobs[:, rows]",
        "reference_logprobs[:, : len(rows)]",
        "test_dpo.py::test_two_answers_end_at_the_tilted_reference",
    ),
    Mutation(
        "DPO's beta stands outside the sigmoid",
        "dpo.py",
        "-F.logsigmoid(beta * margin).mean()",
        "-beta * F.logsigmoid(margin).mean()",
        "test_dpo.py::test_at_the_reference_the_loss_is_log_two_and_the_gradient_half_of_beta",
    ),
    Mutation(
        "the cost gap of another price",
        "evidence.py",
        "rollout.logprobs - _prices(run, rollout) * ratio",
        "rollout.logprobs - ratio",
        "test_evidence.py::test_a_price_for_every_prompt_is_a_larger_beta",
    ),
    Mutation(
        "verbose and concise change places",
        "evidence.py",
        "x[verbose].mean() - x[concise].mean()",
        "x[concise].mean() - x[verbose].mean()",
        "test_evidence.py::test_a_recipe_that_changes_nothing_finds_the_logged_advantages_and_pushes",
    ),
    Mutation(
        "an early stop that never stops",
        "evidence.py",
        "0.0 if _stopped(run, logged) else 1.0",
        "1.0",
        "test_evidence.py::test_after_an_early_stop_there_is_no_push",
    ),
    Mutation(
        "the two-sided test looks at one side",
        "remedy_table.py",
        'found[["length", "gold", "steps"]].all(axis=1)',
        'found[["length", "gold"]].all(axis=1)',
        "test_remedy_table.py::test_the_test_is_two_sided",
    ),
    Mutation(
        "matching forgets the stratum",
        "pair_rules.py",
        'pairs.stratum == "brief", longer * doubt',
        "longer * 0, longer * doubt",
        "test_pair_rules.py::test_match_on_length_counts_within_bins_of_three_tokens_and_within_a_stratum",
    ),
    Mutation(
        "matching takes who hedges for who wins and hedges",
        "pair_rules.py",
        "longer * doubt], 1)",
        "doubt], 1)",
        "test_pair_rules.py::test_match_on_both_axes_counts_apart_who_hedges",
    ),
    Mutation(
        "the padded twin wins",
        "pair_rules.py",
        "made.append((concise, desk.padded(concise, rng, hedges=hedges)))",
        "made.append((desk.padded(concise, rng, hedges=hedges), concise))",
        "test_pair_rules.py::test_the_concise_twin_wins_and_the_padded_one_says_the_same",
    ),
    Mutation(
        "a tie that nobody votes on",
        "pair_rules.py",
        "rows & (rng.random(len(pairs)) < 0.5)",
        "rows & False",
        "test_pair_rules.py::test_as_a_tie_either_twin_wins_half_the_time",
    ),
    Mutation(
        "the loser of another pair is what is beaten",
        "pair_rules.py",
        'getattr(theirs, n.format("chosen"))',
        'getattr(theirs, n.format("rejected"))',
        "test_pair_rules.py::test_answers_to_other_prompts_lose_and_two_of_them_tie",
    ),
    Mutation(
        "slight wins of the shorter one tie",
        "pair_rules.py",
        "(_longer(pairs) > 0) & (pairs.p_label < SLIGHT)",
        "(_longer(pairs) < 0) & (pairs.p_label < SLIGHT)",
        "test_pair_rules.py::test_only_slight_wins_of_the_longer_one_are_ties",
    ),
    Mutation(
        "PAR without the reference's score",
        "score_rules.py",
        "    against = centred(scorer, run)\n",
        "    against = scorer\n",
        "test_score_rules.py::test_par_is_a_sigmoid_around_the_references_score",
    ),
    Mutation(
        "a cap that is a floor",
        "score_rules.py",
        "clamp(max=cap)",
        "clamp(min=cap)",
        "test_score_rules.py::test_a_cap_cuts_what_is_above_it_only",
    ),
    Mutation(
        "length is paid for, not charged",
        "score_rules.py",
        "- alpha * mask.sum(1)",
        "+ alpha * mask.sum(1)",
        "test_score_rules.py::test_a_price_on_tokens",
    ),
    Mutation(
        "the best of the reward models instead of the worst",
        "score_rules.py",
        "each.min(0).values",
        "each.max(0).values",
        "test_score_rules.py::test_three_reward_models_by_hand",
    ),
    Mutation(
        "prices are not charged",
        "ppo.py",
        "self.beta * self.prices[index][:, None]",
        "self.beta * torch.ones_like(scores)[:, None]",
        "test_prices.py::test_every_answer_pays_the_price_of_its_own_prompt",
    ),
    Mutation(
        "prices for KL in the loss are taken",
        "ppo.py",
        'config.kl_place != "reward" or len(prices)',
        "len(prices)",
        "test_prices.py::test_prices_that_nobody_would_be_charged_are_refused",
    ),
    Mutation(
        "dearer where the reference is long",
        "remedies.py",
        "usual[:, 1] < run.config",
        "usual[:, 1] >= run.config",
        "test_prices.py::test_four_times_as_dear_exactly_where_the_reference_is_brief",
    ),
    Mutation(
        "the worst of n",
        "instead.py",
        "rated.argmax(0)",
        "rated.argmin(0)",
        "test_remedies.py::test_the_best_of_n_has_the_highest_score_of_its_draws",
    ),
    Mutation(
        "a later rule takes an earlier one's place",
        "recipe.py",
        "(*getattr(self.rules, k), v)",
        "(v,)",
        "test_remedies.py::test_the_first_name_of_a_stack_acts_first",
    ),
    Mutation(
        "every member sees the same pairs",
        "upstream.py",
        "train.select(rng.integers(len(train), size=len(train)))",
        "train",
        "test_remedies.py::test_members_learn_from_resampled_pairs_each_in_an_order_of_its_own",
    ),
]


def copy_project(to: Path) -> None:
    """Package, tests, settings and the desk, without what was compiled."""
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("minirlhf", "tests"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", to)
    (to / "data").mkdir()
    shutil.copy(ROOT / "data" / "desk.toml", to / "data")


def run_tests(project: Path, tests: Iterable[str]) -> tuple[int, str]:
    """Exit code of pytest (0 passed, 1 failed) and what it printed; torch stays imported."""
    ours = ("minirlhf", "conftest", "fakes", "test_")
    for name in [n for n in sys.modules if n.startswith(ours)]:
        del sys.modules[name]
    # without the collections of garbage that pytest makes to find unclosed files
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    options += ["--rootdir", str(project)]
    named = [str(project / "tests" / test) for test in tests]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = pytest.main([*options, "-c", str(project / "pyproject.toml"), *named])
    return int(code), printed.getvalue()


def check(project: Path, mutation: Mutation) -> str:
    """ "caught", "SURVIVED" or why the entry itself is broken."""
    path = project / "minirlhf" / mutation.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        return f"BROKEN: its text occurs {source.count(mutation.old)} times"
    path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, printed = run_tests(project, [mutation.test])
    finally:
        path.write_text(source, encoding="utf-8")
    verdicts = {0: "SURVIVED", 1: "caught"}
    return verdicts.get(code, f"BROKEN: pytest ended with {code}\n{printed}")


def main(words: list[str]) -> int:
    """Plant the chosen bugs and print who was caught; the number that was not, at most 1."""
    chosen = [m for m in MUTATIONS if all(w.lower() in m.title.lower() for w in words)]
    if not chosen:
        print(f"no title holds all of: {' '.join(words)}")
        return 1
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed, and each start costs
    sys.dont_write_bytecode = True  # two versions of a file within a second look alike to a cache
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        sys.path[0] = str(project)  # instead of this folder: the copy is what gets imported
        worst, printed = run_tests(project, sorted({m.test for m in chosen}))
        if worst:
            print(printed, "\nthe named tests fail without any bug: mend them first")
            return 1
        for mutation in chosen:
            start = time.perf_counter()
            verdict = check(project, mutation)
            worst |= verdict != "caught"
            seconds = time.perf_counter() - start
            print(f"{verdict:9} {seconds:5.1f} s  {mutation.title}  <- {mutation.test}", flush=True)
    print(f"{len(chosen)} mutations, {'all caught' if not worst else 'NOT all caught'}")
    return worst


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(
        status
    )  # a planted bug may leave a training thread behind, at which a plain exit aborts
