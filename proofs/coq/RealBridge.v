(** * Coq's logarithm and exponential on MathComp's ordered field of real numbers

    The inequalities of [Scalar] are about Coq's standard real numbers.  [Rstruct] (MathComp-Analysis) makes the same
    type [R] a real closed field in MathComp's sense, so that sums over finite types and matrices are available.
    This file restates what is needed with MathComp's operations ([<=], [x / y], [x ^+ 2], [`|x|]). *)

From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp.analysis Require Import Rstruct.
From hnkit Require Import Scalar.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** From here on, expressions of type [R] are read with MathComp's operations. *)
Bind Scope ring_scope with R.
Arguments ln x%ring_scope.
Arguments exp x%ring_scope.
Arguments h s%ring_scope.

Implicit Types x y r s t : R.

Lemma expR_pos x : 0 < exp x.
Proof. exact/RltP/exp_pos. Qed.

Lemma lnR1 : ln 1 = 0 :> R.
Proof. exact: ln_1. Qed.

Lemma lnR_exp x : ln (exp x) = x.
Proof. exact: ln_exp. Qed.

Lemma lnRM x y : 0 < x -> 0 < y -> ln (x * y) = ln x + ln y.
Proof. by move=> /RltP x0 /RltP y0; exact: ln_mult. Qed.

Lemma lnRV x : 0 < x -> ln x^-1 = - ln x.
Proof.
move=> x0; have x_ne : x != 0 by rewrite gt_eqF.
have vx0 : 0 < x^-1 by rewrite invr_gt0.
by apply/eqP; rewrite -addr_eq0 -lnRM // mulVf // lnR1.
Qed.

Lemma lnR_div x y : 0 < x -> 0 < y -> ln (x / y) = ln x - ln y.
Proof. by move=> x0 y0; rewrite lnRM ?invr_gt0 // lnRV. Qed.

Lemma lnR_le_sub1 x : 0 < x -> ln x <= x - 1.
Proof. by move=> /RltP x0; apply/RleP/ln_le_sub1. Qed.

Lemma lnR_eq_sub1 x : 0 < x -> ln x = x - 1 -> x = 1.
Proof.
move=> /RltP x0 e; apply/(covariance_gap_eq0 _ x0).
by rewrite e; exact: subrr.
Qed.

Lemma lnR_prod (I : eqType) (s : seq I) (F : I -> R) : (forall i, i \in s -> 0 < F i) ->
  ln (\prod_(i <- s) F i) = \sum_(i <- s) ln (F i).
Proof.
elim: s => [_|i s ih F0]; first by rewrite !big_nil lnR1.
have Fs j : j \in s -> 0 < F j by move=> js; rewrite F0 // inE js orbT.
rewrite !big_cons lnRM ?ih ?F0 ?mem_head //.
by rewrite big_seq prodr_gt0.
Qed.

(** ** The function [h] *)

Lemma hRE x : h x = - ln (1 - x) - x.
Proof. by []. Qed.

Lemma hR0 : h 0 = 0 :> R.
Proof. exact: h0. Qed.

Lemma hR_ge0 s : 0 <= s -> s < 1 -> 0 <= h s.
Proof. by move=> /RleP s0 /RltP s1; apply/RleP/h_ge0. Qed.

Lemma hR_monotone s t : 0 <= s -> s <= t -> t < 1 -> h s <= h t.
Proof. by move=> /RleP s0 /RleP st /RltP t1; apply/RleP/h_monotone. Qed.

Lemma hR_ratio s t : 0 <= s -> s <= t -> 0 < t -> t < 1 -> h s <= s ^+ 2 / t ^+ 2 * h t.
Proof.
move=> /RleP s0 /RleP st t0 /RltP t1.
rewrite mulrAC ler_pdivl_mulr ?exprn_gt0 // [leRHS]mulrC -!RpowE.
by apply/RleP/h_ratio.
Qed.

Lemma logdetR_modulus x r m : 0 <= r -> r < 1 -> `|x| <= r ->
  0 <= m -> m ^+ 2 = 1 + (x + x) + r ^+ 2 -> `|x - ln m| <= h r.
Proof.
move=> r0 r1; rewrite ler_norml => /andP[xl xu] m0 m2.
apply/RleP/logdet_modulus; try exact/RleP; try exact/RltP.
- by split; exact/RleP.
- by move: m2; rewrite !expr2.
Qed.
