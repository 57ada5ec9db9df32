(** * The Euclidean norm of column vectors

    Over any real closed field (the real numbers are one): [norm2 x] is the square root of the sum of the squares of
    the entries.  Cauchy-Schwarz, the triangle inequality, and the comparison with the largest entry. *)

From mathcomp Require Import all_ssreflect all_algebra.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Euclid.
Variables (R : rcfType) (d : nat).
Implicit Types x y : 'cV[R]_d.

Definition sqnorm x : R := \sum_i x i 0 ^+ 2.
Definition norm2 x : R := Num.sqrt (sqnorm x).
Definition dot x y : R := \sum_i x i 0 * y i 0.

Lemma sqnorm_ge0 x : 0 <= sqnorm x.
Proof. by apply: sumr_ge0 => i _; exact: sqr_ge0. Qed.

Lemma norm2_ge0 x : 0 <= norm2 x.
Proof. exact: sqrtr_ge0. Qed.

Lemma sqr_norm2 x : norm2 x ^+ 2 = sqnorm x.
Proof. by rewrite sqr_sqrtr // sqnorm_ge0. Qed.

Lemma sqnorm_eq0 x : sqnorm x = 0 -> x = 0.
Proof.
move=> /psumr_eq0P x0; apply/colP => i; rewrite mxE.
by have /eqP := x0 (fun j _ => sqr_ge0 (x j 0)) i isT; rewrite sqrf_eq0 => /eqP.
Qed.

Lemma norm2_eq0 x : norm2 x = 0 -> x = 0.
Proof. by move=> x0; apply: sqnorm_eq0; rewrite -sqr_norm2 x0 expr0n. Qed.

Lemma norm2_0 : norm2 0 = 0.
Proof. by rewrite /norm2 /sqnorm big1 ?sqrtr0 // => i _; rewrite mxE expr0n. Qed.

Lemma norm2N x : norm2 (- x) = norm2 x.
Proof. by congr Num.sqrt; apply: eq_bigr => i _; rewrite mxE sqrrN. Qed.

Lemma norm2_sub_sym x y : norm2 (x - y) = norm2 (y - x).
Proof. by rewrite -norm2N opprB. Qed.

Lemma sqnormD x y : sqnorm (x + y) = sqnorm x + dot x y *+ 2 + sqnorm y.
Proof.
rewrite /sqnorm /dot -sumrMnl -!big_split; apply: eq_bigr => i _ /=.
by rewrite mxE sqrrD.
Qed.

Lemma sqnormZ a x : sqnorm (a *: x) = a ^+ 2 * sqnorm x.
Proof. by rewrite /sqnorm mulr_sumr; apply: eq_bigr => i _; rewrite mxE exprMn. Qed.

Lemma dotZl a x y : dot (a *: x) y = a * dot x y.
Proof. by rewrite /dot mulr_sumr; apply: eq_bigr => i _; rewrite mxE mulrA. Qed.

Lemma dotC x y : dot x y = dot y x.
Proof. by apply: eq_bigr => i _; rewrite mulrC. Qed.

Lemma cauchy_schwarz x y : dot x y <= norm2 x * norm2 y.
Proof.
have [y0 | y_ne] := eqVneq (sqnorm y) 0.
  by rewrite (sqnorm_eq0 y0) norm2_0 mulr0 /dot big1 // => i _; rewrite mxE mulr0.
have y_pos : 0 < sqnorm y by rewrite lt_neqAle eq_sym y_ne sqnorm_ge0.
apply: (le_trans (ler_norm _)).
rewrite -ler_sqr ?nnegrE ?mulr_ge0 ?norm2_ge0 // exprMn !sqr_norm2 real_normK ?num_real //.
have := sqnorm_ge0 (sqnorm y *: x + (- dot x y) *: y).
have -> : sqnorm (sqnorm y *: x + - dot x y *: y) =
    sqnorm y * (sqnorm x * sqnorm y - dot x y ^+ 2).
  rewrite sqnormD !sqnormZ dotZl (dotC x) dotZl (dotC y); move: (dot x y) (sqnorm y) (sqnorm x).
  move=> p b a; rewrite sqrrN mulNr -expr2 mulrN mulNrn mulr2n opprD addrA.
  by rewrite [p ^+ 2 * b]mulrC subrK mulrBr expr2 -mulrA [b * a]mulrC.
by rewrite pmulr_rge0 // subr_ge0.
Qed.

Lemma ler_norm2D x y : norm2 (x + y) <= norm2 x + norm2 y.
Proof.
rewrite -ler_sqr ?nnegrE ?addr_ge0 ?norm2_ge0 // sqrrD !sqr_norm2 sqnormD.
by rewrite ler_add2r ler_add2l ler_muln2r cauchy_schwarz.
Qed.

Lemma norm2Z a x : norm2 (a *: x) = `|a| * norm2 x.
Proof. by rewrite /norm2 sqnormZ sqrtrM ?sqr_ge0 // sqrtr_sqr. Qed.

Lemma norm2_gt0 x : x != 0 -> 0 < norm2 x.
Proof.
move=> x0; rewrite lt_neqAle norm2_ge0 andbT eq_sym.
by apply: contraNneq x0 => /norm2_eq0 ->.
Qed.

Lemma ler_entry x i : `|x i 0| <= norm2 x.
Proof.
rewrite -ler_sqr ?nnegrE ?norm2_ge0 // sqr_norm2 real_normK ?num_real //.
by rewrite /sqnorm (bigD1 i) //= ler_addl sumr_ge0 // => j _; exact: sqr_ge0.
Qed.

Lemma ler_norm2_sum x : norm2 x <= \sum_i `|x i 0|.
Proof.
have s_ge0 : 0 <= \sum_i `|x i 0| by apply: sumr_ge0.
rewrite -ler_sqr ?nnegrE ?norm2_ge0 // sqr_norm2 expr2 mulr_suml.
apply: ler_sum => i _; rewrite -real_normK ?num_real // expr2 ler_wpmul2l //.
by rewrite (bigD1 i) //= ler_addl sumr_ge0.
Qed.

End Euclid.
