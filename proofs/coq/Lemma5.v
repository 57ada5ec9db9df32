(** * Lemma 5: x + f(x) is bi-Lipschitz and bijective

    In words: let [f : V -> V] be [L]-Lipschitz with [L < 1], and [T x = x + f x].  Then

    - [residual_bilipschitz]: [(1 - L) |x - y| <= |T x - T y| <= (1 + L) |x - y|] (this one for any [L]);
    - [residual_inj], [residual_surj]: [T] is injective, and surjective because the contraction
      [z -> y - f z] has a fixed point;
    - [residual_inverse]: the inverse of [T] is [1 / (1 - L)]-Lipschitz.

    The argument uses of the norm only that it separates points, the triangle inequality, symmetry, and that
    contractions have fixed points, so it is given once for such norms ([Section Argument]) and then used
    twice: for complete normed spaces (fixed points by Banach's theorem of MathComp-Analysis), and for the
    Euclidean norm of [R^d], where an iterate of the contraction is a contraction of the maximum norm. *)

From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp.classical Require Import mathcomp_extra boolp classical_sets functions.
From mathcomp.analysis Require Import reals signed topology normedtype sequences.
From hnkit Require Import Euclid.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.TTheory GRing.Theory Num.Theory.
Import numFieldTopology.Exports numFieldNormedType.Exports.
Local Open Scope ring_scope.

(** The residual map of [f]. *)
Definition residual (V : zmodType) (f : V -> V) (x : V) : V := x + f x.

Definition lipschitz_for (R : realFieldType) (V : zmodType) (N : V -> R) (f : V -> V) (L : R) : Prop :=
  forall x y, N (f x - f y) <= L * N (x - y).

(** ** The argument *)

Section Argument.
Variables (R : realType) (V : zmodType) (N : V -> R).
Hypotheses (N_ge0 : forall x, 0 <= N x) (N_sep : forall x, N x = 0 -> x = 0).
Hypotheses (N_triangle : forall x y, N (x + y) <= N x + N y) (N_opp : forall x, N (- x) = N x).
Variables (f : V -> V) (L : R).
Hypothesis f_lip : lipschitz_for N f L.

Lemma residual_sub x y : residual f x - residual f y = (x - y) + (f x - f y).
Proof. by rewrite /residual opprD addrACA. Qed.

Lemma residual_bilipschitz x y :
  (1 - L) * N (x - y) <= N (residual f x - residual f y) <= (1 + L) * N (x - y).
Proof.
rewrite residual_sub mulrBl mulrDl mul1r; apply/andP; split.
  rewrite ler_subl_addr; apply: (le_trans _ (ler_add (lexx _) (f_lip x y))).
  rewrite -[in leRHS](N_opp (f x - f y)) -[X in N X <= _](addrK (f x - f y)).
  exact: N_triangle.
by apply: (le_trans (N_triangle _ _)); rewrite ler_add2l f_lip.
Qed.

Hypothesis L1 : L < 1.

Lemma residual_inj : injective (residual f).
Proof.
move=> x y e; have /andP[le _] := residual_bilipschitz x y.
apply/eqP; rewrite -subr_eq0; apply/eqP/N_sep/le_anti; rewrite N_ge0 andbT.
rewrite -(pmulr_rle0 _ (_ : 0 < 1 - L)) ?subr_gt0 //; apply: (le_trans le).
(* [N 0 <= 0] because [f] is [L]-Lipschitz: [N (f x - f x) <= L N (x - x)]. *)
rewrite e subrr -(pmulr_rle0 _ (_ : 0 < 1 - L)) ?subr_gt0 // mulrBl mul1r subr_le0.
by have := f_lip x x; rewrite !subrr.
Qed.

Hypothesis fixpoint : forall (G : V -> V) (q : R), q < 1 -> lipschitz_for N G q -> exists z, G z = z.

Lemma residual_surj y : exists x, residual f x = y.
Proof.
have [|z e] := fixpoint (G := fun z => y - f z) L1.
  by move=> a b; rewrite opprB addrC subrKA -N_opp opprB; exact: f_lip.
by exists z; rewrite /residual -{1}e subrK.
Qed.

Lemma residual_bijective : bijective (residual f).
Proof.
have [Tinv TK] := choice residual_surj.
by exists Tinv => // x; apply: residual_inj; rewrite TK.
Qed.

Lemma residual_inverse : exists Tinv : V -> V,
  [/\ cancel (residual f) Tinv, cancel Tinv (residual f) &
      forall x y, N (Tinv x - Tinv y) <= N (x - y) / (1 - L)].
Proof.
have [Tinv fK Kf] := residual_bijective; exists Tinv; split=> // x y.
rewrite ler_pdivl_mulr ?subr_gt0 // mulrC -{2}(Kf x) -{2}(Kf y).
by have /andP[] := residual_bilipschitz (Tinv x) (Tinv y).
Qed.

End Argument.

(** ** Complete normed spaces *)

Section Complete.
Variables (R : realType) (V : completeNormedModType R).
Local Notation norm := (fun x : V => `|x|).

(** A contraction of the whole space has a fixed point. *)
Lemma contraction_fixpoint (G : V -> V) (q : R) : q < 1 -> lipschitz_for norm G q -> exists z, G z = z.
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

End Complete.

(** ** Euclidean space *)

Section Euclidean.
Variable R : realType.

(** A contraction iterated often enough contracts by any factor. *)
Lemma exists_small_power (q c : R) : 0 <= q -> q < 1 -> exists k, q ^+ k * c < 1.
Proof.
move=> q0 q1; have q_norm : `|q| < 1 by rewrite ger0_norm.
have /cvgrPdist_lt/(_ 1 ltr01)[k _ /(_ k (leqnn k))] := cvg_geometric c q_norm.
rewrite sub0r normrN /= mulrC => small; exists k; exact: (le_lt_trans (ler_norm _) small).
Qed.

Lemma iter_lipschitz d (G : 'cV[R]_d -> 'cV[R]_d) (q : R) k : 0 <= q ->
  lipschitz_for (@norm2 R d) G q -> lipschitz_for (@norm2 R d) (iter k G) (q ^+ k).
Proof.
move=> q0 G_lip; elim: k => [|k ih] x y; first by rewrite mul1r.
rewrite !iterS exprS -mulrA; apply: (le_trans (G_lip _ _)).
by rewrite ler_wpmul2l.
Qed.

Lemma norm2_le_max d (x : 'cV[R]_d.+1) : norm2 x <= d.+1%:R * `|x|.
Proof.
apply: (le_trans (ler_norm2_sum x)); rewrite mulr_natl -[X in _ *+ X]card_ord -sumr_const.
apply: ler_sum => i _; rewrite [leRHS]mx_normrE.
exact: (le_bigmax _ (fun ij : 'I_d.+1 * 'I_1 => `|x ij.1 ij.2|) (i, 0)).
Qed.

Lemma max_le_norm2 d (x : 'cV[R]_d.+1) : `|x| <= norm2 x.
Proof.
rewrite [leLHS]mx_normrE; apply/bigmax_leP; split=> [|[i j] _ /=]; first exact: norm2_ge0.
by rewrite ord1 ler_entry.
Qed.

Lemma euclidean_fixpoint d (G : 'cV[R]_d -> 'cV[R]_d) (q : R) : q < 1 ->
  lipschitz_for (@norm2 R d) G q -> exists z, G z = z.
Proof.
case: d => [|d] in G *; first by exists 0; apply/colP => -[].
move=> q1 G_lip; pose Q := Num.max q 0.
have Q0 : 0 <= Q by rewrite le_maxr lexx orbT.
have Q1 : Q < 1 by rewrite lt_maxl q1 ltr01.
have GQ : lipschitz_for (@norm2 R d.+1) G Q.
  by move=> x y; apply: (le_trans (G_lip x y)); rewrite ler_wpmul2r ?norm2_ge0 // le_maxr lexx.
have [k Qk] := exists_small_power d.+1%:R Q0 Q1.
have Gk := iter_lipschitz k Q0 GQ.
have [|z zk] := @contraction_fixpoint R [completeNormedModType R of 'cV[R]_d.+1] (iter k G) _ Qk.
  move=> x y; apply: (le_trans (max_le_norm2 _)); apply: (le_trans (Gk x y)).
  by rewrite -mulrA ler_wpmul2l ?exprn_ge0 // norm2_le_max.
exists z; apply/eqP; rewrite -subr_eq0; apply/eqP/norm2_eq0/le_anti; rewrite norm2_ge0 andbT.
have le : norm2 (G z - z) <= Q ^+ k * norm2 (G z - z).
  by have := Gk (G z) z; rewrite -iterSr iterS zk.
have Qk1 : Q ^+ k < 1.
  by apply: (le_lt_trans _ Qk); rewrite ler_pemulr ?exprn_ge0 // ler1n.
rewrite -(pmulr_rle0 _ (_ : 0 < 1 - Q ^+ k)) ?subr_gt0 //.
by rewrite mulrBl mul1r subr_le0.
Qed.

End Euclidean.
