(** * Reward per nat on finite probability spaces

    In words, for laws on finite sets and any real-valued reward [r]:

    - [frontier_bound]: what [q] gains in mean reward is at most [alpha] times its divergence from [p], plus [alpha]
      times the logarithm of the normaliser of the tilted law, for every temperature [alpha > 0];
    - [frontier_attained]: the tilted law attains it;
    - [certified_normaliser]: for independent prompts, the product of non-negative means of mean one is above
      [1 / delta] with probability [delta] at most. *)

From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp.analysis Require Import Rstruct constructive_ereal.
From hnkit Require Import RealBridge FiniteKL Tilt.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** ** The frontier *)

Section FrontierBound.
Variables (X : finType) (alpha : R) (r : X -> R) (p : dist X).
Hypothesis alpha_gt0 : 0 < alpha.

Lemma frontier_bound q : dominated q p ->
  mean q r <= alpha * (kl_sum q p + ln (normaliser alpha r p)).
Proof.
move=> qp; have := kl_ge0 q (tilt alpha r p).
rewrite kl_tilt /objective /kl qp -EFinB -EFinD lee_fin => le.
rewrite -ler_pdivr_mull // mulrC -subr_ge0.
by move: le; rewrite addrAC.
Qed.

Lemma frontier_attained : 
  mean (tilt alpha r p) r = alpha * (kl_sum (tilt alpha r p) p + ln (normaliser alpha r p)).
Proof.
have tp : dominated (tilt alpha r p) p by apply/dominatedP => x px; apply/eqP; rewrite tilt_eq0 px.
have := kl_refl (tilt alpha r p).
rewrite kl_tilt /objective /kl tp -EFinB -EFinD => -[e].
apply: (mulfI (lt0r_neq0 (_ : 0 < alpha^-1))); first by rewrite invr_gt0.
rewrite mulrA mulVf ?lt0r_neq0 // mul1r mulrC; apply/eqP; rewrite eq_sym -subr_eq0; apply/eqP.
by rewrite -e addrAC.
Qed.

End FrontierBound.

(** ** Markov's inequality for a product over independent prompts *)

Section Markov.
Variables (X : finType) (p : dist X).

Definition prob (A : pred X) : R := \sum_(x | A x) p x.

Lemma markov (W : X -> R) (c : R) : (forall x, 0 <= W x) -> 0 < c ->
  prob [pred x | c <= W x] <= mean p W / c.
Proof.
move=> W0 c0; rewrite ler_pdivl_mulr // /prob /mean mulr_suml.
rewrite [leRHS](bigID [pred x | c <= W x]) /= ler_paddr ?sumr_ge0 // => [x _|].
  by rewrite mulr_ge0 ?pmf_ge0.
by apply: ler_sum => x cW; rewrite ler_wpmul2l ?pmf_ge0.
Qed.

End Markov.

Section Product.
Variables (I X : finType) (p : I -> dist X).

(** The law of independent draws, one for each [i]. *)
Definition prod_pmf (f : {ffun I -> X}) : R := \prod_i p i (f i).

Lemma prod_ge0 f : 0 <= prod_pmf f.
Proof. by apply: prodr_ge0 => i _; exact: pmf_ge0. Qed.

Lemma prod_mean (F : I -> X -> R) :
  \sum_(f : {ffun I -> X}) prod_pmf f * \prod_i F i (f i) = \prod_i mean (p i) (F i).
Proof.
rewrite /mean bigA_distr_bigA /=; apply: eq_bigr => f _.
by rewrite /prod_pmf -big_split.
Qed.

Lemma prod_sum1 : \sum_f prod_pmf f = 1.
Proof.
transitivity (\prod_(i : I) mean (p i) (fun _ => 1)).
  rewrite -prod_mean; apply: eq_bigr => f _.
  by rewrite big1 ?mulr1.
apply: big1 => i _; transitivity (\sum_x p i x); last exact: pmf_sum1.
by apply: eq_bigr => x _; rewrite mulr1.
Qed.

Definition product : dist [finType of {ffun I -> X}] := Dist prod_ge0 prod_sum1.

(** The certificate: [F i] are the estimates of the normalisers [Z i]. *)
Lemma certified_normaliser (F : I -> X -> R) (Z : I -> R) (delta : R) :
  (forall i x, 0 <= F i x) -> (forall i, mean (p i) (F i) = Z i) -> (forall i, 0 < Z i) -> 0 < delta ->
  prob product [pred f : {ffun I -> X} | \prod_i Z i <= delta * \prod_i F i (f i)] <= delta.
Proof.
move=> F0 FZ Z0 d0.
have PZ : 0 < \prod_i Z i by apply: prodr_gt0 => i _.
have W0 (f : {ffun I -> X}) : 0 <= \prod_i F i (f i) by apply: prodr_ge0.
have c0 : 0 < (\prod_i Z i) / delta by rewrite divr_gt0.
have m : mean product (fun f : {ffun I -> X} => \prod_i F i (f i)) = \prod_i Z i.
  by rewrite /mean prod_mean; apply: eq_bigr => i _; rewrite FZ.
have := markov product W0 c0; rewrite m.
have -> : (\prod_i Z i) / ((\prod_i Z i) / delta) = delta.
  by rewrite invf_div mulrC divfK // lt0r_neq0.
apply: le_trans; rewrite le_eqVlt; apply/orP; left; apply/eqP.
by apply: eq_bigl => f /=; rewrite ler_pdivr_mulr // mulrC.
Qed.

End Product.
