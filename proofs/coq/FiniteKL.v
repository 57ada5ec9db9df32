(** * Relative entropy on finite probability spaces

    In words, for probability vectors [p], [q] on a finite set, any weight allowed to be zero:

    - [gibbs]: [KL (q || p) >= 0], and it is zero exactly when [q = p].
    - [data_processing]: for every map [g], [KL (g_# q || g_# p) <= KL (q || p)].

    [KL] takes values in the extended real numbers: it is [+oo] when [q] charges a point that [p] does not, and the sum
    of [q x * ln (q x / p x)] otherwise, where a term with [q x = 0] is [0]. *)

From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp.analysis Require Import Rstruct constructive_ereal.
From hnkit Require Import RealBridge.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** ** Definitions *)

(** A probability vector on [X]. *)
Record dist (X : finType) := Dist {
  pmf :> X -> R;
  pmf_ge0 : forall x, 0 <= pmf x;
  pmf_sum1 : \sum_x pmf x = 1 }.

(** The law of [g x] when [x] has law [p]. *)
Section Pushforward.
Variables (X Y : finType) (g : X -> Y) (p : dist X).

Definition push_pmf (y : Y) : R := \sum_(x | g x == y) p x.

Lemma push_pmf_ge0 y : 0 <= push_pmf y.
Proof. by apply: sumr_ge0 => x _; exact: pmf_ge0. Qed.

Lemma push_pmf_sum1 : \sum_y push_pmf y = 1.
Proof. by rewrite -(pmf_sum1 p) (partition_big g xpredT). Qed.

Definition push : dist Y := Dist push_pmf_ge0 push_pmf_sum1.

End Pushforward.

Section Divergence.
Variable X : finType.
Implicit Types p q : dist X.

(** The mean of [r] under [q]. *)
Definition mean q (r : X -> R) : R := \sum_x q x * r x.

(** [q] is absolutely continuous with respect to [p]. *)
Definition dominated q p : bool := [forall x, (p x == 0) ==> (q x == 0)].

(** The relative entropy where it is finite ... *)
Definition kl_sum q p : R := \sum_x q x * ln (q x / p x).

(** ... and in general. *)
Definition kl q p : \bar R := if dominated q p then (kl_sum q p)%:E else +oo%E.

Lemma dominatedP q p : reflect (forall x, p x = 0 -> q x = 0) (dominated q p).
Proof.
apply: (iffP forallP) => qp x; first by move=> /eqP px; apply/eqP/(implyP (qp x)).
by apply/implyP => /eqP/qp ->.
Qed.

Lemma pmf_pos q x : q x != 0 -> 0 < q x.
Proof. by move=> qx; rewrite lt_neqAle eq_sym qx pmf_ge0. Qed.

Lemma dominated_pos q p x : dominated q p -> 0 < q x -> 0 < p x.
Proof.
move=> /dominatedP qp qx; apply: pmf_pos; apply/eqP => /qp e.
by rewrite e ltxx in qx.
Qed.

Lemma eq_dominated q q' p p' : q =1 q' -> p =1 p' -> dominated q p = dominated q' p'.
Proof. by move=> eq ep; apply: eq_forallb => x; rewrite eq ep. Qed.

Lemma eq_kl q q' p p' : q =1 q' -> p =1 p' -> kl q p = kl q' p'.
Proof.
move=> eq ep; rewrite /kl (eq_dominated eq ep); case: ifP => // _.
by congr (_%:E); apply: eq_bigr => x _; rewrite eq ep.
Qed.

(** ** Gibbs' inequality *)

(** Each term of [KL] is at least [q x - p x], with equality only if [q x = p x]. *)
Lemma kl_term_ge q p x : dominated q p -> q x - p x <= q x * ln (q x / p x).
Proof.
move=> qp; have [-> | /pmf_pos qx] := eqVneq (q x) 0.
  by rewrite mul0r sub0r oppr_le0 pmf_ge0.
have px := dominated_pos qp qx.
rewrite -invf_div lnRV ?divr_gt0 // mulrN ler_oppr opprB.
apply: (le_trans (ler_wpmul2l (ltW qx) (lnR_le_sub1 (divr_gt0 px qx)))).
by rewrite mulrBr mulr1 mulrCA mulfV ?mulr1 ?gt_eqF.
Qed.

Lemma kl_term_eq q p x : dominated q p -> q x * ln (q x / p x) = q x - p x -> q x = p x.
Proof.
move=> qp; have [-> | /pmf_pos qx] := eqVneq (q x) 0.
  by rewrite mul0r sub0r => /eqP; rewrite eq_sym oppr_eq0 => /eqP ->.
have px := dominated_pos qp qx.
rewrite -invf_div lnRV ?divr_gt0 // mulrN => e.
have /lnR_eq_sub1 r1 : ln (p x / q x) = p x / q x - 1.
  apply: (mulfI (lt0r_neq0 qx)).
  rewrite mulrBr mulr1 mulrCA mulfV ?mulr1 ?gt_eqF //.
  by rewrite -[LHS]opprK e opprB.
have /eqP := r1 (divr_gt0 px qx).
by rewrite -(inj_eq (mulIf (lt0r_neq0 qx))) (divfK (lt0r_neq0 qx)) mul1r => /eqP.
Qed.

Lemma sum_pmf_sub q p : \sum_x (q x - p x) = 0.
Proof. by rewrite sumrB !pmf_sum1 subrr. Qed.

Lemma kl_sum_ge0 q p : dominated q p -> 0 <= kl_sum q p.
Proof.
by move=> qp; rewrite -(sum_pmf_sub q p); apply: ler_sum => x _; exact: kl_term_ge.
Qed.

Lemma kl_sum_eq0 q p : dominated q p -> kl_sum q p = 0 -> q =1 p.
Proof.
move=> qp e x; apply: kl_term_eq => //; apply/eqP; rewrite -subr_eq0; apply/eqP.
pose slack z := q z * ln (q z / p z) - (q z - p z).
suff slack0 : forall z, xpredT z -> slack z = 0 by exact: slack0.
apply: psumr_eq0P => [z _|]; first by rewrite subr_ge0 kl_term_ge.
by rewrite sumrB sum_pmf_sub subr0.
Qed.

Lemma kl_sum_refl p : kl_sum p p = 0.
Proof.
apply: big1 => x _; have [-> | px] := eqVneq (p x) 0; first by rewrite mul0r.
by rewrite divff // lnR1 mulr0.
Qed.

Lemma dominated_refl p : dominated p p.
Proof. exact/dominatedP. Qed.

Lemma kl_ge0 q p : (0%:E <= kl q p)%E.
Proof. by rewrite /kl; case: ifP => [/kl_sum_ge0 // | _]; rewrite ?lee_fin ?leey. Qed.

Lemma kl_eq0 q p : kl q p = 0%:E -> q =1 p.
Proof. by rewrite /kl; case: ifP => // qp [] /(kl_sum_eq0 qp). Qed.

Lemma kl_refl p : kl p p = 0%:E.
Proof. by rewrite /kl dominated_refl kl_sum_refl. Qed.

Theorem gibbs q p : (0%:E <= kl q p)%E /\ (kl q p = 0%:E <-> q =1 p).
Proof.
split; first exact: kl_ge0.
by split=> [/kl_eq0 // | e]; rewrite (eq_kl e (frefl _)) kl_refl.
Qed.

End Divergence.

(** ** Data processing *)

Section DataProcessing.
Variables (X Y : finType) (g : X -> Y).
Implicit Types p q : dist X.

Lemma le_push p x : p x <= push g p (g x).
Proof.
by rewrite /= /push_pmf (bigD1 x) //= ler_addl sumr_ge0 // => z _; exact: pmf_ge0.
Qed.

Lemma push_gt0 p x : 0 < p x -> 0 < push g p (g x).
Proof. by move=> px; apply: (lt_le_trans px); exact: le_push. Qed.

Lemma push_dominated q p : dominated q p -> dominated (push g q) (push g p).
Proof.
move=> /dominatedP qp; apply/dominatedP => y py; apply: big1 => x /eqP gx.
apply: qp; apply: le_anti; rewrite pmf_ge0 andbT.
by have := le_push p x; rewrite gx py.
Qed.

(** The mean of a function of the output. *)
Lemma mean_push q (r : Y -> R) : mean (push g q) r = mean q (r \o g).
Proof.
rewrite /mean (partition_big g xpredT) //=; apply: eq_bigr => y _.
by rewrite /push_pmf mulr_suml; apply: eq_bigr => x /eqP <-.
Qed.

(** [q] with the law of the noise given the output replaced by that of [p]. *)
Section Interpolate.
Variables (q p : dist X).
Hypothesis qp : dominated q p.

Definition interp_pmf (x : X) : R := p x * (push g q (g x) / push g p (g x)).

Lemma interp_ge0 x : 0 <= interp_pmf x.
Proof. by rewrite mulr_ge0 ?divr_ge0 ?pmf_ge0. Qed.

Lemma interp_sum1 : \sum_x interp_pmf x = 1.
Proof.
rewrite -(pmf_sum1 (push g q)) (partition_big g xpredT) //=; apply: eq_bigr => y _.
under eq_bigr => x /eqP gx do rewrite /interp_pmf gx.
rewrite -mulr_suml -/(push_pmf g p y) -[push_pmf g p y]/(push g p y).
have [py | py] := eqVneq (push g p y) 0; last by rewrite mulrCA mulfV ?mulr1.
by rewrite py mul0r -[RHS]/(push g q y); have /dominatedP -> := push_dominated qp.
Qed.

Definition interp : dist X := Dist interp_ge0 interp_sum1.

Lemma interp_dominated : dominated q interp.
Proof.
have /dominatedP q0 := qp.
apply/dominatedP => x /eqP; rewrite [interp x]/(interp_pmf x) /interp_pmf !mulf_eq0 invr_eq0.
case/or3P => /eqP e; first exact: q0.
  by apply: le_anti; rewrite pmf_ge0 -e le_push.
by apply/q0/le_anti; rewrite pmf_ge0 andbT -e le_push.
Qed.

(** Chain rule: the divergence is that of the outputs plus that of the noise given the output. *)
Lemma kl_sum_chain : kl_sum q p = kl_sum (push g q) (push g p) + kl_sum q interp.
Proof.
rewrite [kl_sum (push g q) _]mean_push -big_split; apply: eq_bigr => x _ /=.
have [-> | /pmf_pos qx] := eqVneq (q x) 0; first by rewrite !mul0r addr0.
have px := dominated_pos qp qx.
have [gq gp] := (push_gt0 qx, push_gt0 px).
rewrite -mulrDr /interp_pmf -/(push_pmf g q _) -/(push_pmf g p _); congr (_ * _).
rewrite -[push_pmf g q _]/(push g q _) -[push_pmf g p _]/(push g p _).
rewrite !(lnR_div, lnRM) ?mulr_gt0 ?divr_gt0 ?invr_gt0 //.
by rewrite [RHS]addrC opprD addrA subrK.
Qed.

End Interpolate.

Theorem data_processing q p : (kl (push g q) (push g p) <= kl q p)%E.
Proof.
rewrite {2}/kl; case: ifP => [qp | _]; last by rewrite leey.
rewrite /kl push_dominated // lee_fin (kl_sum_chain qp) ler_addl.
by rewrite kl_sum_ge0 // interp_dominated.
Qed.

End DataProcessing.
