(** * Lemma 5: x + f(x) is bi-Lipschitz and bijective

    In words: let [V] be a complete normed space over the reals and [f : V -> V] be [L]-Lipschitz with [L < 1].  Then
    [T x = x + f x] satisfies

    - [lemma5_bilipschitz]: [(1 - L) |x - y| <= |T x - T y| <= (1 + L) |x - y|];
    - [lemma5_bijective]: [T] is injective and surjective (the contraction [z -> y - f z] has a fixed point);
    - [lemma5_inverse]: its inverse is [1 / (1 - L)]-Lipschitz.

    [Euclid] gives the same statements for the Euclidean norm of [R^d]. *)

From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp.classical Require Import boolp classical_sets functions.
From mathcomp.analysis Require Import reals signed topology normedtype sequences.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** The residual map of [f]. *)
Definition residual (V : zmodType) (f : V -> V) (x : V) : V := x + f x.

(** ** The bounds, in any normed space *)

Section BiLipschitz.
Variables (R : realType) (V : normedModType R) (f : V -> V) (L : R).
Hypothesis f_lip : forall x y, `|f x - f y| <= L * `|x - y|.

Lemma residual_sub x y : residual f x - residual f y = (x - y) + (f x - f y).
Proof. by rewrite /residual opprD addrACA. Qed.

Theorem lemma5_bilipschitz x y :
  (1 - L) * `|x - y| <= `|residual f x - residual f y| <= (1 + L) * `|x - y|.
Proof.
rewrite residual_sub mulrBl mulrDl mul1r; apply/andP; split.
  rewrite ler_subl_addr; apply: (le_trans _ (ler_add (lexx _) (f_lip x y))).
  by rewrite -[X in `|X| <= _](addrK (f x - f y)) ler_norm_sub.
by apply: (le_trans (ler_norm_add _ _)); rewrite ler_add2l f_lip.
Qed.

Lemma residual_inj : L < 1 -> injective (residual f).
Proof.
move=> L1 x y e; have /andP[le _] := lemma5_bilipschitz x y.
move: le; rewrite e subrr normr0 pmulr_rle0 ?subr_gt0 // normr_le0 subr_eq0.
by move=> /eqP.
Qed.

End BiLipschitz.

(** ** Surjectivity, in a complete space *)

Section Bijective.
Variables (R : realType) (V : completeNormedModType R) (f : V -> V) (L : R).
Hypotheses (f_lip : forall x y, `|f x - f y| <= L * `|x - y|) (L1 : L < 1).

(** A contraction of the whole space has a fixed point. *)
Lemma contraction_fixpoint (G : V -> V) (q : R) : q < 1 ->
  (forall x y, `|G x - G y| <= q * `|x - y|) -> exists z, G z = z.
Proof.
move=> q1 G_lip.
have q'0 : 0 <= Num.max q 0 by rewrite le_maxr lexx orbT.
have [|||z _ e] := @banach_fixed_point R V setT [fun of totalfun G].
- exists (NngNum q'0); split=> [|[x y] _ /=]; first by rewrite lt_maxl q1 ltr01.
  by apply: (le_trans (G_lip x y)); rewrite ler_wpmul2r // le_maxr lexx.
- exact: closedT.
- by exists 0.
by exists z; rewrite [RHS]e.
Qed.

Lemma residual_surj y : exists x, residual f x = y.
Proof.
have [|z e] := @contraction_fixpoint (fun z => y - f z) L L1.
  by move=> a b; rewrite opprB addrC subrKA distrC; exact: f_lip.
by exists z; rewrite /residual -{1}e subrK.
Qed.

Theorem lemma5_bijective : bijective (residual f).
Proof.
have [Tinv TK] := choice (fun y => residual_surj y).
by exists Tinv => // x; apply: (residual_inj f_lip L1); rewrite TK.
Qed.

Theorem lemma5_inverse : exists2 Tinv : V -> V,
  cancel (residual f) Tinv /\ cancel Tinv (residual f) &
  forall x y, `|Tinv x - Tinv y| <= `|x - y| / (1 - L).
Proof.
have [Tinv fK Kf] := lemma5_bijective; exists Tinv => // x y.
rewrite ler_pdivl_mulr ?subr_gt0 // mulrC -{2}(Kf x) -{2}(Kf y).
by have /andP[] := lemma5_bilipschitz f_lip (Tinv x) (Tinv y).
Qed.

End Bijective.
