(** * The Jacobian of a Lipschitz map

    In words: if [f : R^d -> R^d] is [L]-Lipschitz for the Euclidean norm and differentiable at [x] with Jacobian
    [A], then [|A v| <= L |v|] for every [v].  Differentiability is Frechet's, written out: the error of the
    linear approximation is at most [eps |v|] as soon as [|v|] is small. *)

From mathcomp Require Import all_ssreflect all_algebra.
From hnkit Require Import Euclid.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Jacobian.
Variables (R : rcfType) (d : nat).
Implicit Types (f : 'cV[R]_d -> 'cV[R]_d) (x v : 'cV[R]_d) (A : 'M[R]_d).

(** [A] is the Jacobian of [f] at [x]. *)
Definition has_jacobian f x A : Prop := forall eps, 0 < eps -> exists2 delta, 0 < delta &
  forall v, norm2 v < delta -> norm2 (f (x + v) - f x - A *m v) <= eps * norm2 v.

Theorem jacobian_le f x A L : (forall y z, norm2 (f y - f z) <= L * norm2 (y - z)) ->
  has_jacobian f x A -> forall v, norm2 (A *m v) <= L * norm2 v.
Proof.
move=> f_lip fA v; have [-> | v0] := eqVneq v 0; first by rewrite mulmx0 norm2_0 mulr0.
have v_pos := norm2_gt0 v0.
apply/ler_addgt0Pr => e e0.
have [delta delta0 small] := fA (e / norm2 v) (divr_gt0 e0 v_pos).
pose t := delta / 2%:R / norm2 v.
have t0 : 0 < t by rewrite !divr_gt0 // ltr0n.
have norm_tv : norm2 (t *: v) = t * norm2 v by rewrite norm2Z gtr0_norm.
have tv_small : norm2 (t *: v) < delta.
  by rewrite norm_tv divfK ?gt_eqF // ltr_pdivr_mulr ?ltr0n // ltr_pmulr // ltr1n.
rewrite -(ler_pmul2l t0) -[leLHS](_ : norm2 (A *m (t *: v)) = _); last first.
  by rewrite -scalemxAr norm2Z gtr0_norm.
have -> : A *m (t *: v) = (f (x + t *: v) - f x) - (f (x + t *: v) - f x - A *m (t *: v)).
  by rewrite opprB addrC subrK.
apply: (le_trans (ler_norm2D _ _)); rewrite norm2N mulrDr ler_add //.
  apply: (le_trans (f_lip _ _)); rewrite [x + _]addrC addrK norm_tv mulrCA //.
apply: (le_trans (small _ tv_small)).
by rewrite norm_tv mulrCA divfK ?gt_eqF.
Qed.

End Jacobian.
