(** * Reward-tilted laws on finite probability spaces

    [p0] is a law on a finite set of noises, [g] maps noises to outputs, [r] is a reward on outputs, [alpha] a
    temperature.  The tilted law of [p] by [r] has weights [p x * exp (r x / alpha) / Z].  In words:

    - [normaliser_push]: the normaliser is the same in noise and in output space.
    - [kl_tilt] (Propositions 2 and 4): [KL (q || tilted p) = KL (q || p) - E_q[r] / alpha + ln Z].
    - [kl_tilt_minimisers]: over any family of laws, the minimisers of the divergence from the tilted law are those
      of [J q = KL (q || p) - E_q[r] / alpha].
    - [optimality_gap]: [J q + ln Z] is never negative, and zero exactly at the tilted law.
    - [theorem3_pushforward]: the image by [g] of the tilted noise law is the tilted output law.
    - [theorem3_minimiser]: among all noise laws [q] whose image is the tilted output law, the tilted noise law, and
      no other, minimises [KL (q || p0)].

    [alpha] is any real number; the paper's is positive, which the algebra does not need.  Weights may be zero, and
    divergences infinite (see [FiniteKL]); [p0] need not have full support, and [g] need be neither injective nor
    surjective. *)

From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp.analysis Require Import Rstruct constructive_ereal.
From hnkit Require Import RealBridge FiniteKL.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** ** The tilted law *)

Section Tilt.
Variables (X : finType) (alpha : R) (r : X -> R).

Definition normaliser (p : dist X) : R := \sum_x p x * exp (r x / alpha).

Variable p : dist X.

Definition tilt_pmf (x : X) : R := p x * exp (r x / alpha) / normaliser p.

Lemma normaliser_gt0 : 0 < normaliser p.
Proof.
have term_ge0 x : 0 <= p x * exp (r x / alpha) by rewrite mulr_ge0 ?pmf_ge0 ?ltW ?expR_pos.
rewrite lt_neqAle sumr_ge0 // andbT eq_sym; apply/negP => /eqP z0.
have := oner_eq0 [ringType of R]; rewrite -(pmf_sum1 p) big1 ?eqxx // => x _.
have /eqP := psumr_eq0P (fun z _ => term_ge0 z) z0 (erefl : xpredT x).
by rewrite mulf_eq0 (gt_eqF (expR_pos _)) orbF => /eqP.
Qed.

Lemma tilt_ge0 x : 0 <= tilt_pmf x.
Proof. by rewrite divr_ge0 ?mulr_ge0 ?pmf_ge0 ?ltW ?expR_pos ?normaliser_gt0. Qed.

Lemma tilt_sum1 : \sum_x tilt_pmf x = 1.
Proof. by rewrite -mulr_suml divff // lt0r_neq0 // normaliser_gt0. Qed.

Definition tilt : dist X := Dist tilt_ge0 tilt_sum1.

Lemma tilt_eq0 x : (tilt x == 0) = (p x == 0).
Proof.
by rewrite /= /tilt_pmf !mulf_eq0 invr_eq0 (gt_eqF (expR_pos _)) (gt_eqF normaliser_gt0) !orbF.
Qed.

(** ** Propositions 2 and 4: the divergence from the tilted law *)

(** The objective [J q = KL (q || p) - E_q[r] / alpha]. *)
Definition objective (q : dist X) : \bar R := (kl q p - (mean q r / alpha)%:E)%E.

Lemma kl_tilt q : kl q tilt = (objective q + (ln (normaliser p))%:E)%E.
Proof.
rewrite /objective /kl.
have -> : dominated q tilt = dominated q p by apply: eq_forallb => x; rewrite tilt_eq0.
case: ifP => // qp; rewrite -EFinB -EFinD; congr (_%:E).
rewrite -[ln _]mul1r -(pmf_sum1 q) mulr_suml /mean mulr_suml -sumrB -big_split.
apply: eq_bigr => x _ /=; have [-> | /pmf_pos qx] := eqVneq (q x) 0.
  by rewrite !mul0r subrr addr0.
have px := dominated_pos qp qx.
rewrite -mulrA -mulrBr -mulrDr; congr (_ * _).
have [e0 z0] := (expR_pos (r x / alpha), normaliser_gt0).
by rewrite /tilt_pmf !(lnR_div, lnRM) ?divr_gt0 ?mulr_gt0 // lnR_exp !opprD opprK !addrA.
Qed.

Theorem kl_tilt_minimisers (Phi : Type) (q : Phi -> dist X) (phi : Phi) :
  (forall psi, (kl (q phi) tilt <= kl (q psi) tilt)%E) <->
  (forall psi, (objective (q phi) <= objective (q psi))%E).
Proof.
by split=> le psi; have := le psi; rewrite !kl_tilt ![(_ + (ln _)%:E)%E]addeC lee_add2lE.
Qed.

End Tilt.

Section TiltOrder.
Variables (X : finType) (alpha : R) (r : X -> R) (p : dist X).
Implicit Types q : dist X.

(** Laws of equal mean reward are ordered alike by their divergence from [p] and from the tilted [p]. *)
Lemma le_kl_tilt q q' : mean q r = mean q' r ->
  (kl q (tilt alpha r p) <= kl q' (tilt alpha r p))%E = (kl q p <= kl q' p)%E.
Proof.
move=> m; rewrite !kl_tilt /objective m ![(_ + (ln _)%:E)%E]addeC lee_add2lE //.
by rewrite ![(_ - _)%E]addeC lee_add2lE.
Qed.

(** The Gibbs variational principle: [objective q + ln Z] is the distance from the optimum. *)
Theorem optimality_gap q :
  (0%:E <= objective alpha r p q + (ln (normaliser alpha r p))%:E)%E /\
  ((objective alpha r p q + (ln (normaliser alpha r p))%:E)%E = 0%:E <-> q =1 tilt alpha r p).
Proof. by rewrite -kl_tilt; exact: gibbs. Qed.

End TiltOrder.

(** ** Theorem 3 *)

Section Theorem3.
Variables (X Y : finType) (g : X -> Y) (alpha : R) (r : Y -> R) (p0 : dist X).

(** Equation 21: one normaliser. *)
Lemma normaliser_push : normaliser alpha r (push g p0) = normaliser alpha (r \o g) p0.
Proof. exact: (mean_push g p0 (fun y => exp (r y / alpha))). Qed.

Let tilted_noise := tilt alpha (r \o g) p0.
Let tilted_output := tilt alpha r (push g p0).

Theorem theorem3_pushforward : push g tilted_noise =1 tilted_output.
Proof.
move=> y; rewrite /= /tilt_pmf normaliser_push /push_pmf -!mulr_suml.
by congr (_ / _); rewrite mulr_suml; apply: eq_bigr => x /eqP <-.
Qed.

Lemma feasible_mean q : push g q =1 tilted_output -> mean q (r \o g) = mean tilted_noise (r \o g).
Proof.
move=> gq; rewrite -(mean_push g q r) -(mean_push g tilted_noise r); apply: eq_bigr => y _.
by rewrite gq theorem3_pushforward.
Qed.

Theorem theorem3_minimiser q : push g q =1 tilted_output ->
  (kl tilted_noise p0 <= kl q p0)%E /\ ((kl q p0 <= kl tilted_noise p0)%E -> q =1 tilted_noise).
Proof.
move=> /feasible_mean m; split=> [|le].
  by rewrite -(le_kl_tilt alpha p0 (esym m)) kl_refl kl_ge0.
apply: kl_eq0; apply: le_anti; rewrite kl_ge0 andbT -(kl_refl tilted_noise).
by rewrite (le_kl_tilt alpha p0 m).
Qed.

End Theorem3.
