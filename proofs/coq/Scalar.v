(** * Scalar inequalities

    In words, with [h s = - ln (1 - s) - s]:

    - [covariance_gap_nonneg], [covariance_gap_eq0]: [s - 1 - ln s >= 0] for every [s > 0], with equality only at
      [s = 1].  Half the sum of these terms over the eigenvalues of [S] is the distance, in nats, between the law
      that the L2 loss learns and the tilted noise law (linear generator, concave quadratic reward).
    - [h_monotone]: [h] is nondecreasing on [[0, 1)].
    - [h_ratio]: [h s / s^2] is nondecreasing on [(0, 1)], written without division.
    - [logdet_scalar]: [| x - ln |1 + z| | <= h r] for a complex [z] with real part [x] and modulus [r < 1];
      [|1 + z|^2 = 1 + 2 x + r^2].  For fixed [r], [ln |1 + z| - x] is a concave function of [x] (so its minimum
      is at [x = r] or [x = -r]) and is at most [r^2 / 2].
    - [best_step_pos], [best_step0]: with [q = b^n - a^n], [q ln (q / (b - a))] is at most the integral of
      [n u^(n - 1) ln (n u^(n - 1))] from [a] to [b].

    Real numbers, logarithm and exponential are those of Coq's standard library; derivatives are computed with
    Coquelicot. *)

From Coq Require Import Reals Lra Psatz.
From Coquelicot Require Import Coquelicot.

Local Open Scope R_scope.

(** ** The gap [s - 1 - ln s] *)

Lemma ln_lt_sub1 s : 0 < s -> s <> 1 -> ln s < s - 1.
Proof.
  intros s0 s1.
  assert (ne : ln s <> 0).
  { intros e. apply s1. rewrite <- (exp_ln s s0), e. apply exp_0. }
  pose proof (exp_ineq1 _ ne) as lt. rewrite (exp_ln s s0) in lt. lra.
Qed.

Lemma ln_le_sub1 s : 0 < s -> ln s <= s - 1.
Proof.
  intros s0. destruct (Req_dec s 1) as [-> | ne].
  - rewrite ln_1. lra.
  - pose proof (ln_lt_sub1 s s0 ne). lra.
Qed.

Lemma covariance_gap_nonneg s : 0 < s -> 0 <= s - 1 - ln s.
Proof. intros s0. pose proof (ln_le_sub1 s s0). lra. Qed.

Lemma covariance_gap_eq0 s : 0 < s -> (s - 1 - ln s = 0 <-> s = 1).
Proof.
  intros s0. split; intros e.
  - destruct (Req_dec s 1) as [-> | ne]; [reflexivity |].
    pose proof (ln_lt_sub1 s s0 ne). lra.
  - rewrite e, ln_1. lra.
Qed.

(** ** The function [h] *)

Definition h (s : R) : R := - ln (1 - s) - s.

Lemma h0 : h 0 = 0.
Proof. unfold h. replace (1 - 0) with 1 by ring. rewrite ln_1. lra. Qed.

(** A function with nonnegative derivative on [[a, b]] does not decrease from [a] to [b]. *)
Lemma le_of_deriv_ge0 (f df : R -> R) a b :
  a <= b ->
  (forall x, a <= x <= b -> is_derive f x (df x)) ->
  (forall x, a <= x <= b -> 0 <= df x) ->
  f a <= f b.
Proof.
  intros ab der pos.
  destruct (MVT_gen f a b df) as [c [c_in e]].
  - rewrite Rmin_left, Rmax_right by lra. intros x x_in. apply der. lra.
  - rewrite Rmin_left, Rmax_right by lra. intros x x_in. apply continuity_pt_filterlim.
    apply (ex_derive_continuous f). exists (df x). apply der. lra.
  - rewrite Rmin_left, Rmax_right in c_in by lra.
    pose proof (pos c c_in). nra.
Qed.

Lemma h_monotone s t : 0 <= s -> s <= t -> t < 1 -> h s <= h t.
Proof.
  intros s0 st t1.
  apply (le_of_deriv_ge0 h (fun x => x / (1 - x))); [exact st | |].
  - intros x x_in. unfold h. auto_derive; [lra | field; lra].
  - intros x x_in. apply Rdiv_le_0_compat; lra.
Qed.

Lemma h_ge0 s : 0 <= s -> s < 1 -> 0 <= h s.
Proof. intros s0 s1. rewrite <- h0. apply h_monotone; lra. Qed.

Lemma h_ge_half_square s : 0 <= s -> s < 1 -> s ^ 2 / 2 <= h s.
Proof.
  intros s0 s1.
  pose (f := fun x : R => h x - x ^ 2 / 2).
  assert (le : f 0 <= f s).
  { apply (le_of_deriv_ge0 f (fun x => x ^ 2 / (1 - x))); [exact s0 | |].
    - intros x x_in. unfold f, h. auto_derive; [lra | field; lra].
    - intros x x_in. apply Rdiv_le_0_compat; nra. }
  unfold f in le. rewrite h0 in le. lra.
Qed.

Lemma h_ratio s t : 0 <= s -> s <= t -> t < 1 -> h s * t ^ 2 <= h t * s ^ 2.
Proof.
  intros s0 st t1.
  destruct (Req_dec s 0) as [-> | s_ne].
  { rewrite h0. lra. }
  assert (s_pos : 0 < s) by lra.
  (* The numerator of (h x / x^2)' is x times this function, which is 0 at 0 and has derivative (x/(1-x))^2. *)
  pose (k := fun x : R => x ^ 2 / (1 - x) - 2 * h x).
  assert (k_pos : forall x, 0 <= x < 1 -> 0 <= k x).
  { intros x x_in.
    assert (le : k 0 <= k x).
    { apply (le_of_deriv_ge0 k (fun y => (y / (1 - y)) ^ 2)); [lra | |].
      - intros y y_in. unfold k, h. auto_derive; [lra | field; lra].
      - intros y y_in. apply pow2_ge_0. }
    unfold k in le at 1. rewrite h0 in le. unfold Rdiv in le. lra. }
  assert (le : h s / s ^ 2 <= h t / t ^ 2).
  { apply (le_of_deriv_ge0 (fun x => h x / x ^ 2) (fun x => k x / x ^ 3)); [exact st | |].
    - intros x x_in. unfold k, h. auto_derive; [nra | unfold Rminus; field; lra].
    - intros x x_in. apply Rdiv_le_0_compat; [apply k_pos; lra | apply pow_lt; lra]. }
  apply (Rmult_le_compat_r (s ^ 2 * t ^ 2)) in le; [| nra].
  replace (h s / s ^ 2 * (s ^ 2 * t ^ 2)) with (h s * t ^ 2) in le by (field; lra).
  replace (h t / t ^ 2 * (s ^ 2 * t ^ 2)) with (h t * s ^ 2) in le by (field; lra).
  exact le.
Qed.

(** ** The logarithm of [|1 + z|] *)

(** Weighted arithmetic-geometric mean: the logarithm is concave. *)
Lemma ln_concave a b l : 0 < a -> 0 < b -> 0 <= l <= 1 ->
  l * ln a + (1 - l) * ln b <= ln (l * a + (1 - l) * b).
Proof.
  intros a0 b0 l01. set (c := l * a + (1 - l) * b).
  assert (c0 : 0 < c).
  { unfold c. destruct (Req_dec l 0) as [-> | ne]; [lra |].
    assert (0 < l * a) by (apply Rmult_lt_0_compat; lra).
    assert (0 <= (1 - l) * b) by (apply Rmult_le_pos; lra). lra. }
  assert (tangent : forall x, 0 < x -> ln x <= ln c + (x / c - 1)).
  { intros x x0. replace x with (c * (x / c)) at 1 by (field; lra).
    assert (0 < x / c) by (apply Rdiv_lt_0_compat; lra).
    rewrite ln_mult by assumption. pose proof (ln_le_sub1 (x / c)). lra. }
  pose proof (tangent a a0) as ta. pose proof (tangent b b0) as tb.
  apply (Rmult_le_compat_l l) in ta; [| lra].
  apply (Rmult_le_compat_l (1 - l)) in tb; [| lra].
  assert (e : l * (a / c) + (1 - l) * (b / c) = 1).
  { unfold c. field. fold c. lra. }
  nra.
Qed.

Lemma ln_ratio_ge r : 0 <= r -> r < 1 -> 2 * r <= ln (1 + r) - ln (1 - r).
Proof.
  intros r0 r1.
  pose (f := fun x : R => ln (1 + x) - ln (1 - x) - 2 * x).
  assert (le : f 0 <= f r).
  { apply (le_of_deriv_ge0 f (fun x => 2 * x ^ 2 / (1 - x ^ 2))); [exact r0 | |].
    - intros x x_in. unfold f. auto_derive; [lra | field; nra].
    - intros x x_in. apply Rdiv_le_0_compat; nra. }
  unfold f in le. replace (1 + 0) with 1 in le by ring. replace (1 - 0) with 1 in le by ring. lra.
Qed.

Lemma modulus_pos x r : 0 <= r -> r < 1 -> - r <= x <= r -> 0 < 1 + 2 * x + r ^ 2.
Proof. intros. nra. Qed.

Lemma logdet_scalar x r : 0 <= r -> r < 1 -> - r <= x <= r ->
  Rabs (x - ln (1 + 2 * x + r ^ 2) / 2) <= h r.
Proof.
  intros r0 r1 x_in.
  pose proof (modulus_pos x r r0 r1 x_in) as pos.
  apply Rabs_le. split.
  - pose proof (ln_le_sub1 _ pos). pose proof (h_ge_half_square r r0 r1). lra.
  - destruct (Req_dec r 0) as [e | ne].
    { subst r. replace x with 0 by lra. rewrite h0.
      replace (1 + 2 * 0 + 0 ^ 2) with 1 by ring. rewrite ln_1. lra. }
    (* x = l r + (1 - l) (- r) is a mean of the two end points. *)
    pose (l := (x + r) / (2 * r)).
    assert (l01 : 0 <= l <= 1).
    { unfold l. split; [apply Rdiv_le_0_compat; lra |].
      apply (Rmult_le_reg_r (2 * r)); [lra |].
      replace ((x + r) / (2 * r) * (2 * r)) with (x + r) by (field; lra). lra. }
    assert (ex : x = l * r + (1 - l) * - r) by (unfold l; field; lra).
    pose proof (ln_concave ((1 + r) ^ 2) ((1 - r) ^ 2) l ltac:(nra) ltac:(nra) l01) as conc.
    replace (l * (1 + r) ^ 2 + (1 - l) * (1 - r) ^ 2) with (1 + 2 * x + r ^ 2) in conc
      by (rewrite ex; ring).
    rewrite !ln_pow in conc by lra. change (INR 2) with 2 in conc.
    pose proof (ln_ratio_ge r r0 r1) as ratio.
    assert (low : l * (2 * r) <= l * (ln (1 + r) - ln (1 - r))) by (apply Rmult_le_compat_l; lra).
    unfold h. nra.
Qed.

(** The same with the modulus [m = |1 + z|] given by its square. *)
Lemma logdet_modulus x r m : 0 <= r -> r < 1 -> - r <= x <= r ->
  0 <= m -> m * m = 1 + (x + x) + r * r -> Rabs (x - ln m) <= h r.
Proof.
  intros r0 r1 x_in m0 m2.
  pose proof (modulus_pos x r r0 r1 x_in) as pos.
  assert (m_pos : 0 < m) by nra.
  pose proof (logdet_scalar x r r0 r1 x_in) as le.
  replace (1 + 2 * x + r ^ 2) with (m * m) in le by (rewrite m2; ring).
  rewrite ln_mult in le by assumption.
  replace ((ln m + ln m) / 2) with (ln m) in le by lra. exact le.
Qed.

(** ** The best of several draws *)

(** A primitive of [n u^(n - 1) ln u], for [n = k + 1]. *)
Definition best_primitive (k : nat) (u : R) : R := u ^ S k * ln u - u ^ S k / INR (S k).

Lemma ln_pow_pos (k : nat) u : 0 < u -> ln (u ^ k) = INR k * ln u.
Proof.
  intros u0; induction k as [|k IH]; [rewrite pow_O, ln_1, Rmult_0_l; reflexivity|].
  rewrite <- tech_pow_Rmult, ln_mult, IH, S_INR by (try apply pow_lt; assumption); ring.
Qed.

(** Jensen's inequality for [n u^(n - 1)] on [[a, b]], as a tangent of the logarithm at the mean [m]. *)
Lemma best_step_pos (k : nat) a b : 0 < a -> a < b ->
  let q := b ^ S k - a ^ S k in
  q * ln (q / (b - a)) <= q * ln (INR (S k)) + INR k * (best_primitive k b - best_primitive k a).
Proof.
  intros a0 ab q.
  assert (n0 : 0 < INR (S k)) by (apply lt_0_INR; apply Nat.lt_0_succ).
  assert (q0 : 0 < q).
  { unfold q; apply Rlt_Rminus.
    clear q n0; induction k as [|k IH]; [simpl; lra|].
    rewrite <- (tech_pow_Rmult b), <- (tech_pow_Rmult a).
    apply Rmult_le_0_lt_compat; try lra; apply pow_le; lra. }
  set (m := q / (b - a)).
  assert (m0 : 0 < m) by (apply Rdiv_lt_0_compat; lra).
  set (psi := fun u => u ^ S k * (ln (INR (S k)) - ln m - 1) + INR k * best_primitive k u + m * u).
  set (dpsi := fun u => INR (S k) * u ^ k * (ln (INR (S k)) + INR k * ln u - ln m - 1) + m).
  assert (le : psi a <= psi b).
  { apply (le_of_deriv_ge0 psi dpsi a b); [lra| |].
    - intros u hu; unfold psi, dpsi, best_primitive; auto_derive.
      + repeat split; lra.
      + change (Nat.pred (S k)) with k; change (match k with O => 1 | S _ => INR k + 1 end) with (INR (S k)).
        rewrite S_INR in *; simpl pow; field; lra.
    - intros u hu; unfold dpsi.
      assert (u0 : 0 < u) by lra.
      assert (uk : 0 < u ^ k) by (apply pow_lt; lra).
      set (w := INR (S k) * u ^ k).
      assert (w0 : 0 < w) by (apply Rmult_lt_0_compat; lra).
      assert (lw : ln (INR (S k)) + INR k * ln u = ln w)
        by (unfold w; rewrite ln_mult, ln_pow_pos by assumption; reflexivity).
      rewrite lw.
      assert (t := ln_le_sub1 (m / w) (Rdiv_lt_0_compat _ _ m0 w0)).
      unfold Rdiv in t; rewrite ln_mult, ln_Rinv in t by (try apply Rinv_0_lt_compat; assumption).
      apply (Rmult_le_compat_l w) in t; [|lra].
      replace (w * (m * / w - 1)) with (m - w) in t by (field; lra).
      lra. }
  assert (mp : m * (b - a) = q) by (unfold m; field; lra).
  unfold psi in le; fold m; unfold q in *; nra.
Qed.

(** The same from [a = 0], where the primitive is [0]. *)
Lemma best_step0 (k : nat) b : 0 < b ->
  b ^ S k * ln (b ^ S k / b) <= b ^ S k * ln (INR (S k)) + INR k * best_primitive k b.
Proof.
  intros b0.
  assert (n0 : 0 < INR (S k)) by (apply lt_0_INR; apply Nat.lt_0_succ).
  replace (b ^ S k / b) with (b ^ k) by (simpl; field; lra).
  rewrite ln_pow_pos by assumption; unfold best_primitive.
  assert (t := ln_le_sub1 (/ INR (S k)) (Rinv_0_lt_compat _ n0)).
  rewrite ln_Rinv in t by assumption.
  assert (e : INR k * / INR (S k) = 1 - / INR (S k)) by (rewrite S_INR in *; field; lra).
  assert (bk : 0 < b ^ S k) by (apply pow_lt; lra).
  unfold Rdiv.
  replace (INR k * (b ^ S k * ln b - b ^ S k * / INR (S k)))
    with (b ^ S k * (INR k * ln b) - b ^ S k * (INR k * / INR (S k))) by ring.
  rewrite e; nra.
Qed.
