"""Deliberate bugs, each of which one named test must catch: `python tests/mutations.py`.

Every entry is a mistake that a published implementation made or that is easily made: the sign or
the direction of KL, an index off by one, a mask forgotten, a clip turned round. The script copies
package and tests to a temporary folder, plants one bug at a time, runs the named test alone and
prints a table; it exits with 1 if a bug survives. Words given to it select entries by title, and
`--part 2/8` the second of eight parts of them.
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


# fmt: off
# What is planted where: a line an entry (title, old text, new text, the test that must fail).
PLANTED = {
    "model.py": [
        ("rows stay sorted by length", "return torch.empty_like(found).index_copy_(0, number, found)", "return found", "engine/test_packing.py::test_packed_loss_and_gradient_are_the_plain_ones"),
        ("log-probs off by one token", "columns = [token_logprobs(logits, x[at],", "columns = [token_logprobs(logits, x.roll(-1, 1)[at],", "core/test_model.py::test_all_answers_together_have_probability_one"),
        ("the state after a token instead of before it", "tokens = torch.cat([prompts, responses[:, :-1]], 1)", "tokens = torch.cat([prompts[:, :-1], responses], 1)", "core/test_model.py::test_response_outputs_are_the_states_before_each_token"),
        ("temperature multiplied instead of divided", "logits = logits / temperature", "logits = logits * temperature", "core/test_model.py::test_token_logprobs_of_a_two_token_language"),
        ("the reward model reads at the padding", "    last = last_token(mask)\n", "    last = last_token(torch.ones_like(mask))\n", "core/test_model.py::test_answer_scalars_read_after_the_last_token_whatever_the_padding"),
    ],
    "text.py": [
        ("a pad id inside an answer ends it", "return (tokens != PAD).cumsum(1) > 0", "return tokens != PAD", "core/test_model.py::test_a_pad_id_that_was_sampled_is_a_token_like_others"),
    ],
    "generate.py": [
        ("keys and values are written one column too early", "now = slice(cache.filled - steps, cache.filled)", "now = slice(max(cache.filled - steps - 1, 0), max(cache.filled - 1, steps))", "core/test_generate.py::test_sampled_logprobs_and_values_are_those_of_the_scoring_pass"),
        ("the mask forgets EOS", "mask = ends.cumsum(0) == ends", "mask = ends.cumsum(0) == 0", "core/test_generate.py::test_mask_is_true_up_to_and_including_eos"),
        ("sampling at one temperature, logging at another", "logits = logits / temperature", "logits = logits.clone()", "core/test_generate.py::test_sampled_logprobs_and_values_are_those_of_the_scoring_pass"),
        ("the inverse CDF may pick what has no probability", "right=True", "right=False", "core/test_generate.py::test_inverse_cdf_at_its_edges"),
    ],
    "reward.py": [
        ("the loser wins", "gap = chosen - rejected - margin", "gap = rejected - chosen - margin", "core/test_reward.py::test_bradley_terry_loss_and_gradient_in_closed_form"),
    ],
    "kl.py": [
        ("k1 with the wrong sign", "    return logprobs - ref_logprobs\n", "    return ref_logprobs - logprobs\n", "core/test_kl.py::test_means_by_enumeration"),
        ("k3 with the ratio inverted", "torch.expm1(-log_ratio) + log_ratio", "torch.expm1(log_ratio) - log_ratio", "core/test_kl.py::test_means_by_enumeration"),
        ("exact KL in the other direction", "    p = logp.exp()\n", "    p = ref_logp.exp()\n", "core/test_kl.py::test_exact_kl_against_float64_sums_and_its_edges"),
        ("KL of an answer as a mean where a sum was asked for", 'if aggregation == "token_mean":', 'if aggregation == "sequence_sum":', "core/test_kl.py::test_sequence_sum_grows_with_length_and_token_mean_does_not"),
        ("adaptive beta moves the wrong way", "kl / self.target - 1.0", "1.0 - kl / self.target", "core/test_kl.py::test_adaptive_beta_in_closed_form"),
    ],
    "advantages.py": [
        ("the penalty pays for drift", "torch.where(mask, -beta * kl, 0.0)", "torch.where(mask, beta * kl, 0.0)", "core/test_ppo_losses.py::test_drift_costs_and_agreement_pays_nothing"),
        ("the score one token early", "rewards[rows, last[rows]] +=", "rewards[rows, last[rows] - 1] +=", "core/test_advantages.py::test_score_sits_on_the_last_token_and_kl_on_every_one"),
        ("GAE runs through tokens that the policy did not choose", "running = torch.where(valid, delta + gamma * lam * running, running)", "running = delta + gamma * lam * running", "core/test_advantages.py::test_tokens_that_the_policy_did_not_choose_change_nothing"),
        ("GAE forgets gamma in the decay", "delta + gamma * lam * running", "delta + lam * running", "core/test_advantages.py::test_gae_by_hand_with_the_score_on_eos"),
        ("whitening with the shift flag inverted", "    if not shift_mean:\n", "    if shift_mean:\n", "core/test_advantages.py::test_whitened_entries_have_mean_zero_and_variance_one"),
        ("scaling that centres as well", "torch.where(mask, x / sd, 0.0)", "whiten(x, mask)", "core/test_advantages.py::test_rescaling_keeps_signs_and_whitening_without_shift_keeps_the_mean"),
        ("scaling that keeps the mean whole, as reward whitening does elsewhere", "torch.where(mask, x / sd, 0.0)", "whiten(x, mask, shift_mean=False)", "core/test_advantages.py::test_rescaling_keeps_signs_and_whitening_without_shift_keeps_the_mean"),
        ("a mean over padding too", "total / mask.sum().clamp(min=1)", "total / mask.numel()", "core/test_ppo.py::test_padding_changes_no_metric_and_no_gradient"),
        ("GRPO without the group's mean", "    centred = grouped - grouped.mean(1, keepdim=True)\n    if scale_by_sd:", "    centred = grouped\n    if scale_by_sd:", "core/test_advantages.py::test_grpo_is_the_group_score_and_dr_grpo_only_centres"),
        ("RLOO's baseline includes the answer itself", "(centred * group / (group - 1)).flatten()", "centred.flatten()", "core/test_advantages.py::test_rloo_is_each_answer_against_the_mean_of_the_others"),
        ("PPO charges KL as a bonus", "rewards = torch.where(mask, -beta * kl, 0.0)", "rewards = torch.where(mask, beta * kl, 0.0)", "oracle/test_closed_form.py::test_ppo_ends_where_theory_says"),
        ("advantages centred where their signs were to be kept", '    elif config.whiten_advantages == "scale":\n        advantages = rescale(', '    elif config.whiten_advantages == "scale":\n        advantages = whiten(', "core/test_ppo_losses.py::test_returns_are_never_whitened"),
        ("scores scaled around their mean instead of around 0", "scores = rescale(scores, everyone)", "scores = whiten(scores, everyone, shift_mean=False)", "core/test_ppo_losses.py::test_whitening_scores_rescales_beta_and_whitening_rewards_does_not"),
        ("answers that ended are punished for not ending", "torch.where(finished, scores, scores - config.missing_eos_penalty)", "torch.where(finished, scores - config.missing_eos_penalty, scores)", "core/test_ppo_losses.py::test_missing_eos"),
        ("KL charged in the reward and in the loss", 'charged = beta if config.kl_place == "reward" else 0.0', "charged = beta", "core/test_ppo_losses.py::test_kl_elsewhere_is_measured_but_not_charged"),
    ],
    "critic.py": [
        ("the critic's fit counts tokens, not answers", "share = 1 / rollout.lengths[:, None]", "share = 1 / torch.ones_like(rollout.lengths)[:, None]", "core/test_critic.py::test_the_fit_is_weighted_ridge_regression_by_another_solver"),
        ("ridge shrinks the mean where it must not", "        penalty[-1] = 0.0\n", "        pass\n", "core/test_critic.py::test_ridge_is_least_squares_on_stacked_rows"),
        ("the critic's fit sees the next reward only", "rollout.rewards.flip(1).cumsum(1).flip(1)", "rollout.rewards", "core/test_critic.py::test_a_planted_linear_value_is_recovered"),
    ],
    "ppo.py": [
        ("the clip reversed for A < 0", "surrogate = torch.minimum(ratio * advantages, bounded * advantages)", "surrogate = torch.where(advantages < 0, torch.maximum(ratio * advantages, bounded * advantages), torch.minimum(ratio * advantages, bounded * advantages))", "core/test_ppo_losses.py::test_clip_truth_table"),
        ("the ratio upside down", "    ratio = (logprobs - old_logprobs).exp()\n", "    ratio = (old_logprobs - logprobs).exp()\n", "core/test_ppo_losses.py::test_clip_truth_table"),
        ("the value clip takes the smaller error", "error = torch.maximum(error,", "error = torch.minimum(error,", "core/test_ppo_losses.py::test_value_loss_by_hand"),
        ("the KL loss without a gradient", "                logprobs,\n                batch.ref_logprobs,", "                batch.logprobs,\n                batch.ref_logprobs,", "core/test_ppo_losses.py::test_expected_gradient_of_each_placement"),
        ("the reference scored at temperature 1", "            temperature=self._config.temperature,  # that of sampling", "            temperature=1.0,  # that of sampling", "core/test_ppo.py::test_at_the_start_kl_is_zero_and_the_ratio_one"),
        ("the reference is the policy", "self.reference = reference.requires_grad_(False)", "self.reference = policy", "core/test_ppo.py::test_the_reference_never_moves_and_the_policy_does"),
        ("a copy of a frozen reference stays frozen", "self.policy = policy.requires_grad_(True)", "self.policy = policy", "core/test_ppo.py::test_a_second_run_may_start_from_a_copy_of_a_used_reference"),
        ("an EOS in the prompt counts as the end of the answer", "finished = ((responses == self.eos) & mask).any(-1)", "finished = (torch.cat([prompts, responses], 1) == self.eos).any(-1)", "core/test_ppo.py::test_a_rollout_knows_where_it_came_from_and_how_it_ended"),
        ("group members answer different prompts", "drawn.repeat_interleave(each)", "drawn.repeat(each)", "core/test_ppo.py::test_group_members_answer_one_prompt"),
        ("a NaN gradient reaches the weights", "torch.isfinite(loss + norm)", "torch.isfinite(loss)", "core/test_ppo.py::test_a_finite_loss_with_a_nan_gradient_does_too"),
        ("a resumed run draws other answers", 'self.generator.set_state(state["generator"])', "pass", "core/test_ppo.py::test_a_run_resumed_from_a_file_ends_bit_for_bit_the_same"),
        ("a what-if that moves the run", "            copy.deepcopy(self.policy),\n", "            self.policy,\n", "autopsy/test_parts.py::test_another_epsilon_takes_the_real_update_again"),
        ("what-if epsilon: nobody is told of the minibatches", "                progress()\n", "", "lab/test_batch_lab.py::test_an_update_can_be_cancelled_and_taken_anew"),
        ("prices are not charged", "beta * self.prices[index][:, None]", "beta * torch.ones_like(scores)[:, None]", "remedies/test_prices.py::test_every_answer_pays_the_price_of_its_own_prompt"),
        ("prices for KL in the loss are taken", 'config.kl_place != "reward" or len(prices)', "len(prices)", "remedies/test_prices.py::test_prices_that_nobody_would_be_charged_are_refused"),
    ],
    "dpo.py": [
        ("DPO prefers the loser", "(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)", "(policy_rejected - ref_rejected) - (policy_chosen - ref_chosen)", "core/test_dpo.py::test_the_loss_is_the_papers_in_float64"),
        ("DPO forgets the reference", "(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)", "policy_chosen - policy_rejected", "core/test_dpo.py::test_two_answers_end_at_the_tilted_reference"),
        ("DPO takes a mean over tokens", "logprobs.sum(1).chunk(2)", "logprobs.mean(1).chunk(2)", "core/test_dpo.py::test_log_probs_are_sums_over_the_tokens_of_an_answer"),
        ("DPO asks the reference about other pairs", "reference_logprobs[:, rows]", "reference_logprobs[:, : len(rows)]", "core/test_dpo.py::test_two_answers_end_at_the_tilted_reference"),
        ("DPO's beta stands outside the sigmoid", "-F.logsigmoid(beta * margin).mean()", "-beta * F.logsigmoid(margin).mean()", "core/test_dpo.py::test_at_the_reference_the_loss_is_log_two_and_the_gradient_half_of_beta"),
    ],
    "engine/adamw.py": [
        ("Adam without bias correction", "scale = self.lr / (1 - b1**self.steps)", "scale = self.lr", "engine/test_adamw.py::test_twenty_steps_equal_torch"),
    ],
    "engine/compute.py": [
        ("every chunk hands on the gradients of the first", "ctx.walks[ctx.number].result()", "ctx.walks[0].result()", "engine/test_packing.py::test_packed_loss_and_gradient_are_the_plain_ones"),
        ("chunks come back in the order in which they were started", "for task in reversed(started)", "for task in started", "engine/test_packing.py::test_packed_loss_and_gradient_are_the_plain_ones"),
        ("a worker thread computes with the gradient mode of a fresh thread", "torch.inference_mode(inference), torch.set_grad_enabled(bool(learners))", "torch.set_grad_enabled(True)", "engine/test_compute.py::test_workers_have_the_gradient_mode_of_who_asks"),
    ],
    "engine/intervals.py": [
        ("limits round a mean that is not known", " or np.isnan(mean):", ":", "engine/test_intervals.py::test_an_unknown_value_leaves_no_limits"),
        ("Student's t with a degree of freedom too many", "freedom = np.maximum(n - 1, 1)", "freedom = np.maximum(n, 1)", "engine/test_intervals.py::test_student_by_the_printed_table"),
    ],
    "engine/jobs.py": [
        ("a job has its last try in company", "            self.tries[key] = min(self.tries[key], self.retries - 1)\n", "", "engine/test_jobs.py::test_nobody_fails_for_a_neighbour"),
    ],
    "engine/files.py": [
        ("a file is written where it is read", "        write(scratch)\n        scratch.replace(path)\n", "        write(path)\n", "engine/test_files.py::test_a_full_disk_leaves_the_old_file_and_no_scrap"),
    ],
    "desk/preferences.py": [
        ("labels the wrong way round", ".swap(rng.random(len(pairs)) >= p)", ".swap(rng.random(len(pairs)) < p)", "desk/test_preferences.py::test_labels_fall_as_often_as_their_probability_says"),
    ],
    "desk/world.py": [
        ("a fact said twice earns twice", "for key in tries - tried))", "for key in tries))", "desk/test_world.py::test_hand_graded_answers"),
    ],
    "oracle/chain.py": [
        ("the chain's values are discounted once too often", "start = p * out[..., VERBOSE, 0] + (1 - p) * out[..., CONCISE, 0]", "start = gamma * (p * out[..., VERBOSE, 0] + (1 - p) * out[..., CONCISE, 0])", "oracle/test_closed_form.py::test_values_are_the_mean_of_the_returns"),
    ],
    "oracle/closed_form.py": [
        ("the tilt with beta for 1 / beta", "torch.sigmoid(start + gap / price)", "torch.sigmoid(start + gap * price)", "oracle/test_closed_form.py::test_two_answers_by_hand"),
        ("k3's pull with the ratio inverted", "slopes = (-concise).exp() - (-verbose).exp()", "slopes = verbose.exp() - concise.exp()", "oracle/test_closed_form.py::test_the_pull_is_the_expected_gradient"),
        ("the largest drift at exp(k), not exp(k / 2)", "torch.sigmoid(-k / 2)", "torch.sigmoid(-k)", "oracle/test_closed_form.py::test_the_prompt_that_moves_most_is_brief"),
        ("net advantages with the shares of p and 1 - p exchanged", "return (1 - p) * net, -p * net", "return p * net, -(1 - p) * net", "oracle/test_closed_form.py::test_net_advantages_say_which_side_of_the_optimum_p_is_on"),
    ],
    "audit/auditor.py": [
        ("strata by label instead of by the reference's own length", "np.where(self.reference_length < config.brief_below, brief, detailed)", "np.array([prompt.stratum for prompt in self.probes])", "audit/test_auditor.py::test_strata_are_measured_from_the_references_own_lengths"),
        ("stopping counts states after an answer's end", "[..., self.desk.vocabulary.eos] * mask", "[..., self.desk.vocabulary.eos]", "audit/test_strata.py::test_stopping_is_one_minus_the_chance_of_going_on_state_by_state"),
    ],
    "audit/controls.py": [
        ("the non-length share weighs bins by the policy's answers alone", "counts[:, both].sum(0)", "counts[1, both]", "audit/test_controls.py::test_bins_weigh_by_their_answers_on_both_sides"),
        ("bins that one side leaves empty count in the non-length gain", "both = (counts > 0).all(0)", "both = (counts > 0).any(0)", "audit/test_controls.py::test_a_bin_without_a_partner_drops_out_and_is_counted"),
        ("slopes one column at a time: length is not held against gold", "np.linalg.lstsq(x[:, known], y, rcond=None)[0]", "(x[:, known] * y[:, None]).mean(0)", "audit/test_controls.py::test_slopes_are_partial_and_standardised"),
        ("each table is drawn anew by itself: pairs of answers to a prompt are torn", "{name: column[index] for name, column in table.items()}", "{name: column[rng.integers(size, size=size)] for name, column in table.items()}", "audit/test_controls.py::test_prompts_are_drawn_whole_so_that_pairs_stay_pairs"),
    ],
    "audit/monitor.py": [
        ("the alarm takes its record for the truth", "_scale(_redraw(x, len(x), rng))", "_scale(x)", "audit/test_monitor.py::test_false_alarms_come_as_often_as_was_set"),
        ("CUSUM saves up good days", "np.maximum(0.0, total + z[..., day, :] - slack)", "total + z[..., day, :] - slack", "audit/test_monitor.py::test_cusum_by_hand"),
        ("a day's sd mixes in how probes differ", "np.sqrt(x.var(0, ddof=1).sum(0)) / x.shape[1]", "x.std((0, 1)) / x.shape[1] ** 0.5", "audit/test_monitor.py::test_scale_is_that_of_days_with_fixed_probes"),
    ],
    "autopsy/battery.py": [
        ("the battery's whitened scores are multiplied by their sd", "gap = gap / float(t.score_sd[-1])", "gap = gap * float(t.score_sd[-1])", "autopsy/test_battery.py::test_ends_are_those_of_the_closed_forms"),
        ("the battery takes no KL term for the book's", 'e = float(world.place == "book_literal")', 'e = float(world.place == "none")', "autopsy/test_battery.py::test_what_was_planted_is_named_and_nothing_else[book-literal]"),
        ("the battery takes a reference that stays for one that moves", "(0.0, 0.5) if world.moving else (1.0, 0.05)", "(1.0, 0.05) if world.moving else (0.0, 0.5)", "autopsy/test_battery.py::test_what_was_planted_is_named_and_nothing_else[moving reference]"),
        ("the battery names the nearest cause where none fits", 'said = "cannot tell: no cause on the list fits all the evidence"', 'said, causes = "cannot tell", best.causes', "autopsy/test_battery.py::test_it_cannot_tell_what_is_not_on_the_list"),
        ("what the battery could not measure speaks for every cause", "abs(measured - expected) <= within)", "not abs(measured - expected) > within)", "autopsy/test_battery.py::test_what_was_not_measured_speaks_against"),
    ],
    "autopsy/battery_desk.py": [
        ("the battery prices the push that it calls free", "price_and_credit(rollout, run.config, beta)", "price_and_credit(rollout, run.config, run.beta)", "autopsy/test_battery.py::test_the_push_is_gap_less_the_price_of_the_log_odds_moved"),
    ],
    "autopsy/convention.py": [
        ("a score after EOS falls on the first slot of an empty row", "mask = mask | (after & before)", "mask = mask | after", "autopsy/test_parts.py::test_the_score_one_slot_after_eos_by_hand"),
        ("rewards are whitened in the split but not in its KL", "        scores, kl = scores / sd, kl / sd\n", "        scores = scores / sd\n", "autopsy/test_parts.py::test_whitened_rewards_have_parts_too"),
    ],
    "autopsy/facts.py": [
        ("the bootstrap resamples answers as if prompts had one each", "    asked = rollout.prompts if rollout.index is None else rollout.index[:, None]\n", "    asked = torch.arange(len(rollout))[:, None]\n", "autopsy/test_parts.py::test_intervals_cover_what_they_say"),
        ("a share of tokens as a mean of answers", "(positive.sum(1), rollout.lengths)", "(positive.sum(1) / rollout.lengths.clamp(min=1), one)", "autopsy/test_parts.py::test_facts_by_hand"),
    ],
    "autopsy/parts.py": [
        ("the part of the shift with the wrong sign", "moved = -mean / sd", "moved = mean / sd", "core/test_advantages.py::test_the_split_goes_through_whitening"),
        ("a part of the advantage twice", "baseline=part(no_score, zeros, rollout.values)", "baseline=part(no_score, kl, rollout.values)", "core/test_advantages.py::test_parts_add_up_to_gae"),
        ("the split loses the sign of the KL part", "kl=part(no_score, kl, zeros)", "kl=part(no_score, -kl, zeros)", "core/test_advantages.py::test_parts_add_up_in_degenerate_batches"),
        ("the split pays an answer's KL to the baseline of its group", "    baseline = whole - scores - cost\n", "    baseline, cost = whole - scores, 0 * cost\n", "autopsy/test_parts.py::test_parts_of_group_baselines_by_hand"),
        ("whitening's shift with the wrong sign in the autopsy", "shift = kept - mean / sd", "shift = kept + mean / sd", "autopsy/test_parts.py::test_whitening_by_answer_and_keeping_the_mean"),
    ],
    "autopsy/pushes.py": [
        ("the push forgets what the clip has cut", "style=config.clip_style", 'style="none"', "autopsy/test_parts.py::test_pushes_by_part_and_by_class_sum_to_the_whole"),
        ("the push forgets the value loss on the shared trunk", 'found["value_loss"] = -config.value_coef *', 'found["value_loss"] = 0 *', "autopsy/test_parts.py::test_pushes_by_part_and_by_class_sum_to_the_whole"),
        ("the push ignores that gradients are clipped", "(limit / (gradient.norm() + 1e-6)).clamp(max=1.0)", "(limit / (gradient.norm() + 1e-6)).clamp(min=1.0, max=1.0)", "autopsy/test_parts.py::test_push_is_a_real_sgd_step_to_first_order"),
        ("Adam's push without its first moment", "-rate * b1 * adam.mean", "0 * rate * adam.mean", "autopsy/test_parts.py::test_push_under_adam_with_a_past"),
        ("leverage without the surrogate's weight of a token", "    return slope * by_logprob\n", "    return by_logprob\n", "lab/test_batch_lab.py::test_the_push_on_length_is_a_real_step_to_first_order"),
        ("length without a run: long answers count by their sum", "(centred / lengths.clamp(min=1))[:, None]", "centred[:, None]", "lab/test_batch_lab.py::test_without_a_run_length_moves_by_a_covariance"),
    ],
    "autopsy/reconciliation.py": [
        ("the fitted beta forgets the scale of whitening", 'float(f"{b / a:.6g}")', 'float(f"{b:.6g}")', "autopsy/test_parts.py::test_the_convention_that_made_a_log_is_found"),
    ],
    "autopsy/what_ifs.py": [
        ("a critic fitted again sees the rewards of before", "change = _to_come(batch, after) - _to_come(logged, before)", "change = _to_come(batch, before) - _to_come(logged, before)", "autopsy/test_parts.py::test_a_critic_fitted_again_absorbs_the_cost_of_kl"),
        ("another epsilon is vacuous and nobody says so", "if moved.abs().max() < 1e-4:", "if moved.abs().max() < 0:", "autopsy/test_parts.py::test_bad_batches_are_answered_with_one_sentence"),
        ("batch panel: every length bias shows the logged scores", "raw = {name: split(replace(rollout, scores=x), unit)", "raw = {name: split(rollout, unit)", "lab/test_batch_lab.py::test_without_length_bias_the_reward_part_of_verbose_answers_falls"),
    ],
    "drift/batches.py": [
        ("a wrong answer counts as a concise one", '(padding == 0) & grades["correct"]', "padding == 0", "drift/test_batches.py::test_batch_facts_by_hand"),
        ("the top tenth of tokens and padding", "sizes = log_ratio[rollout.mask].abs()", "sizes = log_ratio.flatten().abs()", "drift/test_batches.py::test_batch_facts_by_hand"),
    ],
    "drift/make_data.py": [
        ("a rebuild that removes a lecturer's files", "for pattern in OURS for path in folder.glob(pattern)", 'for path in folder.rglob("*.safetensors")', "drift/test_data.py::test_a_rebuild_removes_what_is_stale_and_nothing_else"),
    ],
    "drift/recipe.py": [
        ("a rule without a name passes for any other", '        if "<" in name:', '        if "<<" in name:', "drift/test_recipe.py::test_a_rule_without_a_name_is_refused"),
        ("a later rule takes an earlier one's place", "(*getattr(self.rules, name), changes[name])", "(changes[name],)", "remedies/test_arms.py::test_the_first_name_of_a_stack_acts_first"),
    ],
    "drift/run.py": [
        ("the checkpoint before its own audit", "self.audit(self.ppo.policy, self.ppo.steps)\n                self._save_ppo()\n", "self._save_ppo()\n                self.audit(self.ppo.policy, self.ppo.steps)\n", "drift/test_run.py::test_killed_before_any_step_and_resumed_is_the_same_run"),
        ("a resumed run forgets the steps before", '        for name in ("history", "metrics", "answers", "batches"):\n', '        for name in ("history", "answers", "batches"):\n', "drift/test_run.py::test_killed_before_any_step_and_resumed_is_the_same_run"),
    ],
    "drift/stages.py": [
        ("every stage draws the same random numbers", "[self.config.seed, zlib.crc32(name.encode())]", "[self.config.seed, 0]", "drift/test_run.py::test_every_stage_draws_from_a_stream_of_its_own"),
        ("every member sees the same pairs", "train.select(rng.integers(len(train), size=len(train)))", "train", "remedies/test_arms.py::test_members_learn_from_resampled_pairs_each_in_an_order_of_its_own"),
    ],
    "remedies/arms.py": [
        ("dearer where the reference is long", "lengths < run.config", "lengths >= run.config", "remedies/test_prices.py::test_four_times_as_dear_exactly_where_the_reference_is_brief"),
    ],
    "remedies/on_batch.py": [
        ("verbose and concise change places", "x[verbose].mean() - x[concise].mean()", "x[concise].mean() - x[verbose].mean()", "remedies/test_on_batch.py::test_a_recipe_that_changes_nothing_finds_the_logged_advantages_and_pushes"),
        ("the cost gap of another price", "rollout.logprobs - _prices(ppo, rollout) * ratio", "rollout.logprobs - ratio", "remedies/test_on_batch.py::test_a_price_for_every_prompt_is_a_larger_beta"),
        ("an early stop that never stops", "0.0 if _stopped(stop, logged) else 1.0", "1.0", "remedies/test_on_batch.py::test_after_an_early_stop_there_is_no_push"),
    ],
    "remedies/pairs.py": [
        ("matching forgets the stratum", 'pairs.stratum == "brief", longer * hedged', "longer * 0, longer * hedged", "remedies/test_pairs.py::test_match_on_length_counts_within_bins_of_three_tokens_and_within_a_stratum"),
        ("matching takes who hedges for who wins and hedges", "longer * hedged], 1)", "hedged], 1)", "remedies/test_pairs.py::test_match_on_both_axes_counts_apart_who_hedges"),
        ("the padded twin wins", "prompts, winners, losers)", "prompts, losers, winners)", "remedies/test_pairs.py::test_the_concise_twin_wins_and_the_padded_one_says_the_same"),
        ("a tie that nobody votes on", "rows & swapped", "rows & False", "remedies/test_pairs.py::test_as_a_tie_either_twin_wins_half_the_time"),
        ("the loser of another pair is what is beaten", "=theirs.chosen,\n        rejected_mask=theirs.chosen_mask,\n        gold_rejected=theirs.gold_chosen,", "=theirs.rejected,\n        rejected_mask=theirs.rejected_mask,\n        gold_rejected=theirs.gold_rejected,", "remedies/test_pairs.py::test_answers_to_other_prompts_lose_and_two_of_them_tie"),
        ("slight wins of the shorter one tie", "(_longer_won(pairs) > 0) & slight", "(_longer_won(pairs) < 0) & slight", "remedies/test_pairs.py::test_only_slight_wins_of_the_longer_one_are_ties"),
    ],
    "remedies/ranking.py": [
        ("the covariate enters the ranking loss with the wrong sign", "margin=-(terms @ self.phi)", "margin=terms @ self.phi", "remedies/test_ranking.py::test_phi_is_the_log_odds_of_the_longer_one_where_nothing_else_differs"),
        ("phi climbs the loss", "self.phi + NEWTON_RATE", "self.phi - NEWTON_RATE", "remedies/test_ranking.py::test_phi_is_the_log_odds_of_the_longer_one_where_nothing_else_differs"),
        ("the covariate is the loser's length minus the winner's", "pairs.chosen_mask.sum(1) - pairs.rejected_mask.sum(1)", "pairs.rejected_mask.sum(1) - pairs.chosen_mask.sum(1)", "remedies/test_ranking.py::test_phi_is_the_log_odds_of_the_longer_one_where_nothing_else_differs"),
        ("phi starts at 0, so that r takes length in first", "for _ in range(200):", "for _ in range(0):", "remedies/test_ranking.py::test_filler_is_worth_much_less_to_a_transformer_fitted_with_the_covariate"),
        ("ODIN pushes length out of the length head", "(quality.abs() - length)", "(quality.abs() + length)", "remedies/test_ranking.py::test_odins_loss_is_the_sum_of_its_parts_in_float64"),
        ("ODIN keeps the length head", "F.normalize(trunk.scalar.weight)[:1]", "F.normalize(trunk.scalar.weight)[1:]", "remedies/test_ranking.py::test_odin_takes_length_out_of_the_head_it_keeps_and_into_the_other"),
        ("ODIN's heads may shrink", "F.linear(x, F.normalize(self.weight))", "F.linear(x, self.weight)", "remedies/test_ranking.py::test_heads_are_read_at_length_one_however_large_their_weights_are"),
    ],
    "remedies/scores.py": [
        ("PAR without the reference's score", "    against = centred(scorer, run)\n", "    against = scorer\n", "remedies/test_scores.py::test_par_is_a_sigmoid_around_the_references_score"),
        ("a cap that is a floor", "clamp(max=cap)", "clamp(min=cap)", "remedies/test_scores.py::test_a_cap_cuts_what_is_above_it_only"),
        ("length is paid for, not charged", "- alpha * mask.sum(1)", "+ alpha * mask.sum(1)", "remedies/test_scores.py::test_a_price_on_tokens"),
        ("the best of the reward models instead of the worst", "scores.min(0).values", "scores.max(0).values", "remedies/test_scores.py::test_three_reward_models_by_hand"),
    ],
    "remedies/without_ppo.py": [
        ("the worst of n", "scores.argmax(0)", "scores.argmin(0)", "remedies/test_arms.py::test_the_best_of_n_has_the_highest_score_of_its_draws"),
    ],
    "sweeps/remedy_table.py": [
        ("the two-sided test looks at one side", 'found[["length", "gold", "steps"]].all(axis=1)', 'found[["length", "gold"]].all(axis=1)', "sweeps/test_remedy_table.py::test_the_test_is_two_sided"),
    ],
    "sweeps/seeds.py": [
        ("a claim is held whatever its threshold", "(values >= claim.low)", "(values > -np.inf)", "sweeps/test_seeds.py::test_a_threshold_that_is_missed_is_not_held"),
    ],
    "cli/main.py": [
        ("an error that ends with status 0", '        print(f"minirlhf: {error}", file=sys.stderr)\n        return 1\n', '        print(f"minirlhf: {error}", file=sys.stderr)\n        return 0\n', "cli/test_bad_input.py::test_on_the_command_line"),
    ],
    "cli/reading.py": [
        ("what a setting refuses is named as in Python", "            if name.rpartition(\".\")[2] in settings:\n", "            if not name:\n", "cli/test_main.py::test_what_is_wrong_is_one_sentence"),
    ],
    "cli/terminal.py": [
        ("a job that failed is not reported", '            if " " in text:', '            if " " in text and done == 0:', "cli/test_terminal.py::test_a_job_that_failed_is_a_line_above_the_bar"),
    ],
    "lab/heatmap.py": [
        ("heat map: words of a batch are not escaped", "text = html.escape(visible(word))", "text = visible(word)", "lab/test_heatmap.py::test_texts_of_a_batch_are_data"),
        ("heat map: orange is above 0", 'sign = "n" if value < 0 else "p"', 'sign = "n" if value > 0 else "p"', "lab/test_heatmap.py::test_every_token_is_there_with_its_value_and_within_reach_of_the_keyboard"),
        ("heat map: marks where the reference did stop and the policy too", "rollout.mask & (rollout.responses != eos)", "rollout.mask", "lab/test_heatmap.py::test_stops_that_were_passed_up"),
    ],
    "lab/background.py": [
        ("a closed panel's job goes on", '            self.job.cancel()\n        super().close()', '            pass\n        super().close()', "lab/test_background.py::test_closing_a_panel_stops_its_job"),
        ("a job that was told to stop goes on where the next one begins", "        self._stop = Stop()\n        # a daemon", "        self._stop.clear()\n        # a daemon", "lab/test_background.py::test_the_next_job_does_not_wake_the_one_before"),
    ],
    "lab/picture.py": [
        ("batch panel: the words' map arrives a message before the picture", "            self.view.value = self.above + picture + self.below\n", "            self.view.value = self.above + self.below\n            self.view.value = self.above + picture + self.below\n", "lab/test_batch_lab.py::test_words_picture_and_reasons_leave_in_one_message"),
    ],
    "lab/panels/batch.py": [
        ("batch panel: epsilon's update keeps the logged advantages", "advantages=advantages.to(dtype), returns", "advantages=self._batch.advantages, returns", "lab/test_batch_lab.py::test_an_update_is_reused_and_says_so_where_beta_has_moved"),
        ("batch panel: a stale update is called exact", "        if at == dials:\n", "        if at:\n", "lab/test_batch_lab.py::test_an_update_is_reused_and_says_so_where_beta_has_moved"),
        ("batch panel: the clip scales nothing that is shown", "{name: slope * x for name, x in tokens.items()}", "{name: x for name, x in tokens.items()}", "lab/test_batch_lab.py::test_a_smaller_epsilon_cuts_more_tokens"),
        ("batch panel: length is what the clip leaves of the push", "self._moves(found.parts.total)", "self._moves(self.seen)", "lab/test_batch_lab.py::test_length_is_the_push_before_any_clip_at_every_epsilon"),
    ],
    "lab/panels/batch_plots.py": [
        ("batch panel: the waterfall's parts all start at zero", "[0.0, *np.cumsum(sizes[:-2]), 0.0]", "[0.0] * len(sizes)", "lab/test_batch_lab.py::test_the_waterfall_starts_each_part_where_the_last_one_ended"),
        ("fork: advantages of answers that took other words before", "rollout.responses[:, :at] == one.responses[:, :at]", "rollout.responses[:, : at + 1] == one.responses[:, : at + 1]", "lab/test_batch_lab.py::test_the_fork_reads_both_models_and_the_advantage_of_what_was_taken"),
    ],
    "lab/panels/batch_table.py": [
        ("batch table: answers without a token come first when sorted from the top", "np.where(np.isnan(values), np.inf, rank)", "np.where(np.isnan(values), -np.inf, rank)", "lab/test_heatmap.py::test_order_keeps_ties_and_puts_nan_last"),
        ("batch table: mean advantage over the padded width", "np.where(length > 0, length, np.nan)", "np.where(length > 0, mask.shape[1], np.nan)", "lab/test_heatmap.py::test_columns_by_hand"),
        ("batch table: after sorting an answer out of sight stays chosen", "self._list(None)", "self._list(self.row)", "lab/test_heatmap.py::test_sorting_chooses_the_first_line_and_choosing_is_heard"),
    ],
    "lab/panels/goodhart.py": [
        ("prompts are grouped by the half of the answers that is then measured", "(x > tokens).mean(0) for x in (self._first, self._second)", "(x > tokens).mean(0) for x in (self._first, self._first)", "lab/test_goodhart_lab.py::test_groups_are_made_by_one_half_and_measured_on_the_other"),
    ],
    "lab/panels/steered_run.py": [
        ("an interrupted step of the live run leaves half a step behind", "            self.run.load_state_dict(before)\n            raise\n", "            raise\n", "lab/test_steered_run.py::test_an_interrupt_keeps_every_whole_step"),
        ("an interrupted step of the live run puts beta back to where the run began", "        before = self.run.state_dict()\n", '        before = self.run.state_dict() | {"beta": self._start["beta"]}\n', "lab/test_steered_run.py::test_an_interrupt_in_the_step_of_a_turned_dial_loses_neither"),
        ("the live run's length bias turns nothing", 'self._scorers[dials["length_bias"]]', 'self._scorers[self._first["length_bias"]]', "lab/test_steered_run.py::test_the_length_bias_swaps_what_pays_the_run"),
        ("pause waits for the step in flight", '            self.job.cancel()\n            self._says = "pausing"', '            self.job.halt()\n            self._says = "pausing"', "lab/test_steered_run.py::test_pause_answers_at_once_while_a_step_is_in_flight"),
        ("a closed live run goes on learning", '"""Stop the thread, then close the panel."""\n        self.job.halt()', '"""Stop the thread, then close the panel."""', "lab/test_steered_run.py::test_running_the_cell_again_stops_the_old_thread"),
    ],
}
# fmt: on
MUTATIONS = [
    Mutation(title, file, old, new, test)
    for file, entries in PLANTED.items()
    for title, old, new, test in entries
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
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(project):
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


def part_of(mutations: list[Mutation], number: int, parts: int) -> list[Mutation]:
    """Part `number` of 1 .. `parts`: bugs that one test catches stay together."""
    tests = sorted({m.test for m in mutations})
    mine = set(tests[number - 1 :: parts])
    return [m for m in mutations if m.test in mine]


def chosen_by(arguments: list[str]) -> list[Mutation]:
    """The entries that the command line asks for."""
    if "--part" in arguments:
        at = arguments.index("--part")
        number, parts = map(int, arguments[at + 1].split("/"))
        return part_of(chosen_by(arguments[:at] + arguments[at + 2 :]), number, parts)
    return [m for m in MUTATIONS if all(w.lower() in m.title.lower() for w in arguments)]


def main(words: list[str]) -> int:
    """Plant the chosen bugs and print who was caught; the number that was not, at most 1."""
    chosen = chosen_by(words)
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
    # a planted bug may leave a training thread behind, at which a plain exit aborts
    os._exit(status)
